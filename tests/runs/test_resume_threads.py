"""A run with countdown_tiny's batches on two threads that is stopped, and goes on as if it had not been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import environment, method, metrics
from torch import Tensor

LAST = 4
# countdown_tiny's batches and engine: enough numbers for two threads to share.
BATCHES = [
    "--data.problems_per_iteration",
    "32",
    "--data.minibatches",
    "2",
    "--data.engine",
    "popo_lightning.engines.vllm.engine.VLLMEngine",
    "--data.engine.cpu_cache_gib",
    "0.25",
]
FEW_EVALUATIONS = ["--evaluation.every_n_iterations", "0", "--checkpoint.every_n_epochs", "2"]


def popo_on_two_threads(config: Path, folder: Path, *more: str) -> None:
    command = [sys.executable, "-m", "popo_lightning", "fit", "--config", config, *method("popo"), *BATCHES]
    command += [*FEW_EVALUATIONS, "--run.folder", folder, *more]
    two = environment() | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # else a waiting thread takes a core
    done = subprocess.run([str(part) for part in command], env=two, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def weights(folder: Path) -> dict[str, Tensor]:
    (last,) = (folder / "checkpoints").glob(f"*step={2 * LAST}.ckpt")
    found: dict[str, Tensor] = torch.load(last, weights_only=True)["state_dict"]
    return found


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_two_threads_resume_bit_for_bit(config: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    popo_on_two_threads(config, whole, "--trainer.max_epochs", str(LAST))
    popo_on_two_threads(config, parts, "--trainer.max_epochs", "2")
    popo_on_two_threads(config, parts, "--trainer.max_epochs", str(LAST), "--run.resume", "true")
    assert [row["step"] for row in metrics(whole) if "train/loss" in row] == list(range(1, LAST + 1))
    assert metrics(parts) == metrics(whole)
    left, right = weights(parts), weights(whole)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
