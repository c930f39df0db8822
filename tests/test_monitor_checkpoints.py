"""An iteration's numbers over several ranks: what a checkpoint keeps of them, and an alarm that stops all ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nodes_for_tests import one_node
from processes_for_tests import on_two_ranks
from test_token_sums import added, drawn
from tiny_models import method, metrics

from popo_lightning.callbacks.monitor import WORK, Monitor, _of_all_ranks
from popo_lightning.token_sums import TokenSums, token_metrics


def of_rank(rank: int) -> dict[str, Any]:
    """Two steps and their tokens, as a checkpoint has them."""
    steps = [{"mean_loss": float(rank + i), "grad_norm": 0.5, "train_seconds": 1.0 + rank} for i in range(2)]
    steps = [step | {"row_tokens": 10.0 * rank + i, "flops": 3.0 + rank} for i, step in enumerate(steps)]
    tokens = added(TokenSums(), *drawn(torch.Generator().manual_seed(rank), [3, 5 + rank], [0, 1 + rank]))
    return {"steps": steps, "tokens": tokens.to_plain()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_an_iteration_that_goes_on_with_other_ranks_loses_nothing(ranks: int) -> None:
    """Of three ranks; of as many, each gets its own back."""
    saved = [of_rank(rank) for rank in range(3)]
    resumed = []
    for rank in range(ranks):
        monitor = Monitor()
        monitor.load_state_dict({"steps": saved[0]["steps"], "ranks": saved})
        monitor._resume(rank, ranks)
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
    state = Monitor().state_dict()
    assert state["steps"] == [] and state["ranks"][0]["tokens"]["ages"] == {}
    monitor = Monitor()
    monitor.load_state_dict(state)
    monitor._resume(0, 1)
    assert monitor._steps == [] and monitor._tokens.count == 0


def alarmed(gaps: tuple[float, float]) -> str:
    """What an iteration's end raises on this rank, whose own tokens have this gap; rank 0's are those of both."""
    dist.init_process_group("gloo")
    monitor: Any = Monitor(gap_error=0.2)
    monitor._training_metrics = lambda trainer: {"engine/logp_gap_mean": gaps[dist.get_rank()]}
    monitor._seconds = lambda data: {}
    data = SimpleNamespace(rollout_metrics={}, totals=SimpleNamespace(metrics=lambda: {}), iteration=1)
    trainer: Any = SimpleNamespace(datamodule=data, loggers=[], callbacks=[], callback_metrics={})
    try:
        monitor.on_train_epoch_end(trainer, SimpleNamespace(compute_dtype=torch.float32))
    except RuntimeError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def test_all_ranks_stop_or_none(tmp_path: Path) -> None:
    """A rank that stopped alone would leave the others waiting for it."""
    for number, (gaps, stops) in enumerate([((0.3, 0.1), True), ((0.1, 0.3), False)]):
        errors = on_two_ranks(alarmed, tmp_path / str(number), gaps)
        assert [f"{gaps[0]} nats" in error for error in errors] == [stops] * 2
        assert errors[0] == errors[1]


@pytest.mark.slow
def test_two_ranks_stopped_inside_an_iteration(config: Path, tmp_path: Path) -> None:
    """Each rank goes on with its own tokens: the iteration's numbers are those of the run that never stopped."""
    command = ["fit", "--config", config, *method("popo"), "--trainer.strategy", "ddp", "--trainer.max_epochs", "2"]
    command += ["--data.problems_per_iteration", "8", "--evaluation.every_n_iterations", "0"]
    command += ["--checkpoint.every_n_epochs", "null", "--checkpoint.every_n_train_steps", "1"]
    command += ["--checkpoint.save_top_k", "-1"]
    one_node(2, *command, "--run.folder", tmp_path / "whole", seconds=200)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (stopped,) = (tmp_path / "resumed" / "checkpoints").glob("*step=5.ckpt")  # of three minibatches the second
    state = torch.load(stopped, weights_only=True)["callbacks"]["Monitor"]
    assert [len(rank["steps"]) for rank in state["ranks"]] == [2, 2]
    assert not torch.equal(*(rank["tokens"]["ages"][0]["sums"] for rank in state["ranks"]))
    one_node(2, *command, "--ckpt_path", stopped, seconds=200)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
