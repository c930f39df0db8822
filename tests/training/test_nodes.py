"""Two nodes with FSDP2 over gloo train as one process does, with a vLLM engine on each. One node may die."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.nodes import TwoNodes, two_nodes
from helpers.tiny_models import method, popo_process
from model.test_sharding import CLOSE, EVERY, SAME, SAME_COUNTS, near, sharded, trained

pytestmark = pytest.mark.slow
DYING = ["--trainer.callbacks+", "helpers.tiny_models.KillRankAt", "--trainer.callbacks.rank", "1"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    try:
        with two_nodes() as joined:
            yield joined
    except PermissionError as error:
        pytest.skip(str(error))


def test_two_nodes_train_as_one_process_does(config: Path, tmp_path: Path, nodes: TwoNodes) -> None:
    command = ["fit", "--config", config, *method("grpo"), *SAME, *EVERY, "--run.resume", "true"]
    sharded(1, *command, "--run.folder", tmp_path / "one", "--trainer.max_epochs", "3", whole_checkpoints=True)
    changing = [*command, "--run.folder", tmp_path / "changing"]
    nodes.run(*changing, "--trainer.max_epochs", "1", seconds=200)
    sharded(1, *changing, "--trainer.max_epochs", "2", whole_checkpoints=True)
    nodes.run(*changing, "--trainer.max_epochs", "3", seconds=200)
    one, changed = trained(tmp_path / "one"), trained(tmp_path / "changing")
    assert [row["step"] for row in changed] == [1, 2, 3]
    for alone, together in zip(one, changed, strict=True):
        for name in CLOSE:
            assert together[name] == near(alone[name], alone["step"]), (name, alone["step"])
        for name in SAME_COUNTS:
            assert together[name] == alone[name], (name, alone["step"])


@pytest.mark.vllm
def test_a_vllm_engine_on_each_node_trains_countdown(config: Path, tmp_path: Path, nodes: TwoNodes) -> None:
    command = ["fit", "--config", config, *method("popo"), *EVERY, "--data.problems_per_iteration", "10"]
    command += ["--data.engine", "popo_lightning.engines.vllm.engine.VLLMEngine", "--run.folder", tmp_path]
    nodes.run(*command, "--trainer.max_epochs", "3", seconds=400)
    rows = trained(tmp_path)
    assert len(rows) == 3 and all(row["train/grad_norm"] > 0 for row in rows)
    assert all(row["engine/logp_gap_max"] < 1e-4 for row in rows), "an engine did not get the split policy's weights"
    assert rows[-1]["total/responses"] == 3 * 10 * 4


def test_a_rank_that_dies_stops_the_others_and_leaves_a_whole_checkpoint(
    config: Path, tmp_path: Path, nodes: TwoNodes
) -> None:
    command = ["fit", "--config", config, *method("popo"), *EVERY, "--data.problems_per_iteration", "8"]
    command += ["--run.folder", tmp_path, "--run.resume", "true"]
    first, second = nodes.start(*command, *DYING, "--trainer.max_epochs", "4")
    printed = second.communicate(timeout=200)[0]
    died = time.monotonic()
    left = first.communicate(timeout=60)[0]
    assert time.monotonic() - died < 60
    assert first.returncode != 0 and second.returncode != 0
    assert "SIGKILL" in printed or "Signal 9" in printed, printed[-3000:]
    assert "another rank" in left, left[-3000:]
    newest = max((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert torch.load(newest, weights_only=True)["epoch"] == 1  # counted from 0, so the second iteration
    finished = popo_process(*command, "--trainer.max_epochs", "4")
    assert finished.returncode == 0, finished.stderr[-3000:]
