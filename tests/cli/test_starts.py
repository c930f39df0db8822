"""Lightning starts two processes of popo fit without torchrun, each with its own vLLM engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.nodes import fsdp2
from helpers.tiny_models import method, metrics, popo_process

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
STRATEGIES = {"ddp": ["--trainer.strategy", "ddp"], "fsdp2": fsdp2(2, whole_checkpoints=True)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_without_torchrun(strategy: str, config: Path, tmp_path: Path) -> None:
    command = ["fit", "--config", config, *method("popo"), *STRATEGIES[strategy], "--trainer.devices", "2"]
    command += ["--data.engine", "popo_lightning.engines.vllm.engine.VLLMEngine", "--data.problems_per_iteration", "10"]
    finished = popo_process(*command, "--run.folder", tmp_path, "--trainer.max_epochs", "3")
    assert finished.returncode == 0, finished.stderr[-5000:]
    rows = [row for row in metrics(tmp_path) if "train/loss" in row]
    assert len(rows) == 3 and all(row["train/grad_norm"] > 0 for row in rows)
    assert all(row["engine/logp_gap_max"] < 1e-4 for row in rows), "an engine did not get the policy's weights"
    assert rows[-1]["total/responses"] == 3 * 10 * 4
