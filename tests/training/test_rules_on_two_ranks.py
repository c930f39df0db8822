"""Rules whose ranks need different groups or passes train on two ranks, and resume exactly there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.nodes import one_node
from helpers.tiny_models import method, metrics, popo

Args = list[str | Path]
SHORT: Args = ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", "0", "--evaluation.samples", "0"]
PROBLEMS = 8
pytestmark = pytest.mark.slow


def grafted(config: Path, tmp_path: Path) -> tuple[Args, Callable[[list[dict[str, float]]], float]]:
    """Returns the settings of a run that takes a peer's groups, and how many it has taken."""
    peers = tmp_path / "peers.jsonl"
    record = ["fit", "--config", config, *method("grpo"), *SHORT, "--data.composer", "RecordGroups"]
    record += ["--data.composer.path", peers, "--model.optimizer.init_args.lr", "0", "--trainer.max_epochs", "6"]
    popo(*record, "--data.group_size", "8", "--seed_everything", "3", "--run.folder", tmp_path / "peer")
    return [*method("graft"), "--data.composer.peers", json.dumps([str(peers)])], lambda rows: sum(
        row["replay/grafted_groups"] for row in rows
    )


def continued(config: Path, tmp_path: Path) -> tuple[Args, Callable[[list[dict[str, float]]], float]]:
    """Returns the settings of a run whose critic learns from continuations of what is replayed, and their number."""
    settings = [*method("popo_mad_td"), "--data.composer.fresh_continuations", "0.5", "--data.group_size", "4"]
    return settings, lambda rows: rows[-1]["total/responses"] - len(rows) * PROBLEMS * 4


@pytest.mark.parametrize("rule", [grafted, continued])
def test_two_ranks_resume_exactly(rule: object, config: Path, tmp_path: Path) -> None:
    settings, count = rule(config, tmp_path)  # type: ignore[operator]
    command: Args = ["fit", "--config", config, *settings, *SHORT, "--trainer.strategy", "ddp"]
    command += ["--data.problems_per_iteration", str(PROBLEMS), "--data.minibatches", "2", "--trainer.max_epochs", "4"]
    command += ["--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "-1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    one_node(2, *command, "--run.folder", whole, seconds=200)
    rows = [row for row in metrics(whole) if "train/loss" in row]
    assert len(rows) == 4 and count(rows) > 0
    shutil.copytree(whole, resumed)
    for number in (3, 4):
        (resumed / "checkpoints" / f"iteration-{number:04d}.ckpt").unlink()
    one_node(2, *command, "--run.folder", resumed, "--run.resume", "true", seconds=200)
    assert metrics(resumed) == metrics(whole)
    left, right = (
        torch.load(folder / "checkpoints" / "iteration-0004.ckpt", weights_only=True)["state_dict"]
        for folder in (resumed, whole)
    )
    assert all(torch.equal(left[name], right[name]) for name in right)
