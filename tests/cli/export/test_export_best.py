"""popo export --best chooses the kept checkpoint with the best value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.exports import exported, policy_weights, refused, same_bits, tensors
from helpers.tiny_models import method, popo

from popo_lightning.cli.export.saved_policy import best_checkpoint, opened

EVERY = ["--checkpoint.every_n_epochs", 1, "--evaluation.every_n_iterations", 1, "--trainer.max_epochs", 3]


def ran(config: Path, folder: Path, *settings: Any) -> Path:
    popo("fit", "--config", config, *method("popo"), *EVERY, "--run.folder", folder, *settings)
    return folder


def value_after(run: Path, iteration: int, label: str) -> float:
    content = json.loads((run / "evaluations" / f"iteration-{iteration:06d}" / "results.json").read_text())
    return float(content["benchmarks"]["countdown"]["numbers"][label])


def set_value(run: Path, iteration: int, label: str, value: float) -> None:
    file = run / "evaluations" / f"iteration-{iteration:06d}" / "results.json"
    content = json.loads(file.read_text())
    content["benchmarks"]["countdown"]["numbers"][label] = value
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run with all of its checkpoints."""
    return ran(config, tmp_path_factory.mktemp("best") / "run", "--checkpoint.save_top_k", -1)


@pytest.mark.slow
@pytest.mark.parametrize("best", [1, 2, 3])
def test_without_a_monitor_greedy_accuracy_decides(run: Path, tmp_path: Path, best: int) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for iteration in (0, 1, 2, 3):
        set_value(copy, iteration, "greedy", 0.9 if iteration == best else 0.95 if iteration == 0 else 0.1)
    assert opened(best_checkpoint(copy)).iterations == best
    exported(copy, tmp_path / "out", "--best")
    kept = policy_weights(best_checkpoint(copy))
    assert all(same_bits(tensor, kept[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_of_equals_the_newest_and_avg_where_nothing_was_greedy(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for iteration in (1, 2, 3):
        set_value(copy, iteration, "greedy", 0.5)
    assert opened(best_checkpoint(copy)).iterations == 3
    for iteration in (1, 2, 3):
        file = copy / "evaluations" / f"iteration-{iteration:06d}" / "results.json"
        file.write_text(file.read_text().replace('"greedy": 0.5', '"other": 1'))
        set_value(copy, iteration, "avg_at_2", 0.7 if iteration == 2 else 0.1)
    assert opened(best_checkpoint(copy)).iterations == 2


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_monitor_decides_as_the_run_noted(config: Path, tmp_path: Path, mode: str) -> None:
    """It chooses among the kept checkpoints, even if the newest is kept beside the best."""
    kept = ["--checkpoint.monitor", "eval/countdown/avg_at_2", "--checkpoint.mode", mode, "--checkpoint.save_top_k", 2]
    run = ran(config, tmp_path / "run", *kept, "--checkpoint.save_last", "true")
    values = {iteration: value_after(run, iteration, "avg_at_2") for iteration in (1, 2, 3)}
    chosen = opened(best_checkpoint(run)).iterations
    assert values[chosen] == (max if mode == "max" else min)(values.values())
    assert len(set(values.values())) > 1, "any would have been right"


def test_the_last_evaluation_counts_though_no_checkpoint_is_due(config: Path, tmp_path: Path) -> None:
    """The final checkpoint is saved before its evaluation, so it is not among those noted as the best."""
    kept = ["--checkpoint.monitor", "eval/countdown/avg_at_2", "--checkpoint.mode", "max", "--checkpoint.save_top_k", 1]
    run = ran(config, tmp_path / "run", *kept, "--checkpoint.every_n_epochs", 2)
    for iteration in (1, 2, 3):
        set_value(run, iteration, "avg_at_2", 0.9 if iteration == 3 else 0.1)
    assert opened(best_checkpoint(run)).iterations == 3


def test_none_has_a_value(config: Path, tmp_path: Path) -> None:
    once = ["--evaluation.every_n_iterations", 0, "--trainer.max_epochs", 1]
    run = ran(config, tmp_path / "run", *once)
    shutil.rmtree(run / "evaluations")
    assert "no checkpoint that the run" in refused("export", run, tmp_path / "out", "--best")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert "no whole checkpoint" in refused("export", run, tmp_path / "out", "--best")
