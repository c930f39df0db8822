"""Two ranks on one machine: unequal micro-batches, one checkpoint for both, and going on from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import method, metrics

LIMIT_SECONDS = 150  # a rank that waits for the other for ever is what this test is about


def two_ranks(*arguments: str | Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]
    command = [*launcher, "-m", "popo_lightning", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.slow
def test_two_ranks_train_and_resume(config: Path, tmp_path: Path) -> None:
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.micro_batch_tokens", "60"]
    command = ["fit", "--config", config, *method("popo"), *ranks, "--run.folder", tmp_path]
    command += [
        "--checkpoint.every_n_epochs",
        "1",
        "--checkpoint.save_top_k",
        "-1",
        "--data.problems_per_iteration",
        "8",
    ]
    two_ranks(*command, "--trainer.max_epochs", "2")
    (newest,) = (tmp_path / "checkpoints").glob("epoch=1-*.ckpt")
    ranks_saved = torch.load(newest, weights_only=True)["RolloutDataModule"]["ranks"]
    assert len(ranks_saved) == 2
    asked = [{g["problem"]["id"] for g in rank["composer"]["buffer"]["groups"]} for rank in ranks_saved]
    assert asked[0] != asked[1], "ranks ask different problems"
    two_ranks(*command, "--trainer.max_epochs", "3", "--run.resume", "true")
    assert [row["step"] for row in metrics(tmp_path) if "train/loss" in row] == [1, 2, 3]
