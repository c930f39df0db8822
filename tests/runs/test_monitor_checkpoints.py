"""An iteration's metrics over several ranks: what a checkpoint keeps of them, and an alarm that stops all ranks."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.nodes import one_node
from helpers.processes import on_two_ranks
from helpers.tiny_models import method, metrics
from training.test_token_sums import added, drawn

from popo_lightning.callbacks.monitor import UNMEASURED, WORK, Monitor, _of_all_ranks
from popo_lightning.core.kept_state import containers_copied
from popo_lightning.rollout.rank_states import RankKeeper
from popo_lightning.training.token_sums import TokenSums, token_metrics


def of_rank(rank: int) -> dict[str, Any]:
    """Returns two steps and their tokens, as a checkpoint has them."""
    steps = [{"mean_loss": float(rank + i), "grad_norm": 0.5, "train_seconds": 1.0 + rank} for i in range(2)]
    steps = [step | {"row_tokens": 10.0 * rank + i, "flops": 3.0 + rank} for i, step in enumerate(steps)]
    tokens = added(TokenSums(), *drawn(torch.Generator().manual_seed(rank), [3, 5 + rank], [0, 1 + rank]))
    return {"steps": steps, "tokens": tokens.to_plain()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_an_iteration_that_goes_on_with_other_ranks_loses_nothing(ranks: int) -> None:
    """The checkpoint has three ranks. With as many ranks, each gets its own state back."""
    saved = [of_rank(rank) for rank in range(3)]
    resumed = []
    for rank in range(ranks):
        monitor = Monitor()
        monitor._resume(saved, rank, ranks)
        resumed.append(monitor)
    if ranks == 3:
        assert [monitor._steps for monitor in resumed] == [each["steps"] for each in saved]
    before = [_of_all_ranks(steps) for steps in zip(*(each["steps"] for each in saved), strict=True)]
    after = [_of_all_ranks(steps) for steps in zip(*(monitor._steps for monitor in resumed), strict=True)]
    assert [pytest.approx(step) for step in before] == after
    assert all(before[0][name] == sum(each["steps"][0][name] for each in saved) > 0 for name in WORK)
    whole = token_metrics([TokenSums.from_plain(each["tokens"]) for each in saved])
    assert token_metrics([monitor._tokens for monitor in resumed]) == pytest.approx(whole)


def test_nothing_is_kept_between_iterations() -> None:
    kept = Monitor()._own()
    assert kept["steps"] == [] and kept["tokens"]["ages"] == {}
    monitor = Monitor()
    monitor._resume([kept], 0, 1)
    assert monitor._steps == [] and monitor._tokens.count == 0
    monitor._resume([], 0, 1)  # a checkpoint without any


def state_of_one_rank() -> list[Any]:
    """Only rank 0 asks for the states that callbacks and rollouts have at a place. Rank 1 does something else."""
    dist.init_process_group("gloo")
    found: list[Any] = []
    if dist.get_rank() == 0:
        monitor = Monitor()
        keeper = RankKeeper()
        keeper.keep("monitor", monitor._own)
        found = [monitor.state_dict(), keeper.state()]
    dist.destroy_process_group()
    return found


def test_the_state_is_no_collective(tmp_path: Path) -> None:
    """If it were one, a rank that asks for it alone, after its own exception, would wait forever for the others."""
    found, _ = on_two_ranks(state_of_one_rank, tmp_path, seconds=60)
    assert found[0] == {"steps": []} and found[1]["monitor"]["steps"] == []


def test_a_place_is_what_it_was() -> None:
    """Later steps append and replace without changing it. Tensors are not copied."""
    weights = torch.ones(2)
    state: dict[str, Any] = {"steps": [{"loss": 1.0}], "pair": ([1], 2)}
    kept = containers_copied(state | {"weights": weights})
    state["steps"][0]["loss"] = 2.0
    state["steps"].append({})
    state["pair"][0].append(3)
    assert {name: kept[name] for name in state} == {"steps": [{"loss": 1.0}], "pair": ([1], 2)}
    assert kept["weights"] is weights


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_counted_and_named(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    """Loggers omit it. Metrics without anything to measure do not count."""
    monitor = Monitor()
    metrics = {"reward/score": bad, "policy/entropy": 1.0, "weight/replayed_max": bad} | dict.fromkeys(UNMEASURED, bad)
    with caplog.at_level(logging.WARNING):
        assert monitor._not_finite(metrics, 7) == ["reward/score", "weight/replayed_max"]
        assert monitor._not_finite(metrics, 8) == ["reward/score", "weight/replayed_max"]
        assert monitor._not_finite({"policy/entropy": 1.0}, 9) == []
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "iteration 7" in said[0] and f"reward/score {bad}" in said[0]


def test_a_gap_that_is_no_number_raises_the_alarm(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="disagree by nan nats"):
        Monitor(gap_error=0.2)._check_gap(math.nan, exact=True)
    with caplog.at_level(logging.WARNING):
        Monitor(gap_error=None)._check_gap(math.nan, exact=True)
    assert "disagree by nan nats" in caplog.text


def alarmed(*cases: tuple[float, float]) -> list[str]:
    """Returns what an iteration's end raises on this rank. Its own tokens have this gap; rank 0's are those of both."""
    dist.init_process_group("gloo")
    try:
        return [_alarm(gaps) for gaps in cases]
    finally:
        dist.destroy_process_group()


def _alarm(gaps: tuple[float, float]) -> str:
    monitor: Any = Monitor(gap_error=0.2)
    monitor._training_metrics = lambda trainer: {"engine/logp_gap_mean": gaps[dist.get_rank()]}
    monitor._seconds = lambda data: {}
    data = SimpleNamespace(rollout_metrics={}, totals=SimpleNamespace(metrics=lambda: {}), iteration=1, gap_floor=None)
    trainer: Any = SimpleNamespace(datamodule=data, loggers=[], callbacks=[], callback_metrics={})
    try:
        monitor.on_train_epoch_end(trainer, SimpleNamespace(compute_dtype=torch.float32))
    except RuntimeError as error:
        return str(error)
    return ""


def test_all_ranks_stop_or_none(tmp_path: Path) -> None:
    """A rank that stopped alone would leave the others waiting for it."""
    first, second = on_two_ranks(alarmed, tmp_path, (0.3, 0.1), (0.1, 0.3))
    assert "0.3 nats" in first[0] and first[1] == ""
    assert first == second


@pytest.mark.slow
def test_two_ranks_stopped_inside_an_iteration(config: Path, tmp_path: Path) -> None:
    """Each rank continues with its own tokens, and the iteration's metrics equal those of an uninterrupted run."""
    command = ["fit", "--config", config, *method("popo"), "--trainer.strategy", "ddp", "--trainer.max_epochs", "2"]
    command += ["--data.problems_per_iteration", "8", "--evaluation.every_n_iterations", "0"]
    command += ["--checkpoint.every_n_epochs", "null", "--checkpoint.every_n_train_steps", "1"]
    command += ["--checkpoint.save_top_k", "-1"]
    one_node(2, *command, "--run.folder", tmp_path / "whole", seconds=200)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (stopped,) = (tmp_path / "resumed" / "checkpoints").glob(
        "iteration-0001-minibatch-2.ckpt"
    )  # the second of three minibatches
    ranks = torch.load(stopped, weights_only=True)["RolloutDataModule"]["ranks"]
    kept = [rank["callbacks"]["monitor"] for rank in ranks]
    assert [len(of_rank["steps"]) for of_rank in kept] == [2, 2]
    sums = [{age: of["sums"].tolist() for age, of in rank["tokens"]["ages"].items()} for rank in kept]
    assert sums[0] != sums[1] and all(sums)
    one_node(2, *command, "--ckpt_path", stopped, seconds=200)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
