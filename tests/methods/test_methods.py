"""Every method of configs/method trains, and its interrupted run resumes without a difference."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.places import REPOSITORY
from helpers.tiny_models import method, metrics, popo
from torch import Tensor

METHODS = sorted(path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml"))
ITERATIONS = 3


def after(folder: Path, iteration: int) -> Path:
    """Returns the checkpoint written after the given number of iterations."""
    (found,) = (folder / "checkpoints").glob(f"iteration-{iteration:04d}.ckpt")
    return found


def trained(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(after(folder, ITERATIONS), weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("name", METHODS)
def test_trains_and_resumes_exactly(name: str, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["fit", "--config", config, *method(name), "--trainer.max_epochs", str(ITERATIONS)]
    command += ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", 0, "--evaluation.samples", 0]
    command += ["--checkpoint.every_n_epochs", 1, "--checkpoint.save_top_k", -1, "--model.optimizer.init_args.lr", 5e-4]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    popo(*map(str, command), "--run.folder", whole)
    assert "`transient`" not in caplog.text, "a rule forgets what it changes"
    rows = [row for row in metrics(whole) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row[column]) for row in rows for column in ("train/loss", "train/grad_norm"))
    assert sum(row["train/grad_norm"] for row in rows) > 0
    # Engine and policy agree, whatever the center of the trust region.
    assert all(row.get("engine/logp_gap_mean", 0.0) < 1e-4 for row in rows)

    shutil.copytree(whole, resumed)
    after(resumed, ITERATIONS).unlink()
    popo(*map(str, command), "--run.folder", resumed, "--run.resume", "true")
    assert metrics(resumed) == metrics(whole)
    left, right = trained(resumed), trained(whole)
    assert [weight for weight in right if not torch.equal(left[weight], right[weight])] == []
