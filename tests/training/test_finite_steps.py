"""Steps that are not finite are skipped on all ranks alike, counted and named. A run of only such steps ends."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.processes import on_two_ranks, rows_of, train, whole_tensors
from helpers.tiny_models import fit, popo
from torch.optim.lr_scheduler import LambdaLR

from popo_lightning.core.errors import NotFiniteError, SettingError
from popo_lightning.methods.ppo_ewma import ProximalAverage
from popo_lightning.model.critic import Critic
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.weights import TruncatedIS
from popo_lightning.policy import PolicyModule
from popo_lightning.training.finite_steps import all_finite


class Poison(L.Callback):
    """Gives the rows of some steps, counted from 0, advantages that are not finite, on one rank or on all."""

    def __init__(self, *steps: int, rank: int | None = None, value: float = math.nan) -> None:
        self.steps, self.rank, self.value = steps, rank, value
        self.seen = 0
        self.before: list[Any] = []
        self.after: list[Any] = []

    def state_of(self, trainer: L.Trainer, pl_module: Any) -> Any:
        scheduler = pl_module.lr_schedulers()
        found = {
            "weights": whole_tensors(pl_module.named_parameters()),
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "scheduler": None if scheduler is None else scheduler.last_epoch,
            "global_step": trainer.global_step,
        }
        return copy.deepcopy(found)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(self.state_of(trainer, pl_module))
        if self.seen in self.steps and self.rank in (None, trainer.global_rank):
            bad = [torch.full((len(group.responses),), self.value) for group in batch.groups]
            batch.groups = [replace(group, advantages=of) for group, of in zip(batch.groups, bad, strict=True)]
        self.seen += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.after.append(self.state_of(trainer, pl_module) | {"outputs": outputs})


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def assert_untouched(poison: Poison, step: int) -> None:
    after = {name: value for name, value in poison.after[step].items() if name != "outputs"}
    assert same(poison.before[step], after)


def warm_up(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (step + 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_changes_nothing(
    policy: Path, tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    poison, average = Poison(2, value=value), ProximalAverage()
    objective = Objective(behave_weight=TruncatedIS(correct_fresh=True))
    with caplog.at_level(logging.WARNING):
        run = fit(
            policy,
            tmp_path,
            callbacks=[poison],
            proximal=average,
            objective=objective,
            model={"lr_scheduler": warm_up},
        )
    assert_untouched(poison, 2)
    outputs = [each["outputs"] for each in poison.after]
    assert [each["skipped"] for each in outputs] == [False, False, True, False, False, False]
    assert [each["stepped"] for each in outputs] == [not each["skipped"] for each in outputs]
    assert run.trainer.global_step == 5 and run.module.finite_steps.in_a_row == 0
    assert average.mass == pytest.approx(sum(average.beta**age for age in range(6)))
    rows = [row for row in run.rows if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in rows] == [0, 1, 0]
    assert [row["train/optimizer_steps"] for row in rows] == [2, 3, 5]
    assert all("policy/entropy" in row and row["train/not_finite_metrics"] == 0 for row in rows)
    said = [record.message for record in caplog.records if "skipped the optimizer step" in record.message]
    assert len(said) == 1 and "iteration 2, minibatch 1 " in said[0] and str(value) in said[0]


def test_a_run_that_takes_no_step_any_more_ends(policy: Path, tmp_path: Path) -> None:
    poison = Poison(0, 2, 3)
    with pytest.raises(NotFiniteError, match=r"2 optimizer steps in a row .*iteration 2, minibatch 2 .*learning rate"):
        fit(policy, tmp_path, callbacks=[poison], model={"max_skipped_steps": 2})
    assert poison.seen == 4  # one skip is fewer than two, and separate skips are not in a row


@pytest.mark.parametrize("lr", [1e12, 1e20, 1e30])
def test_a_learning_rate_that_explodes(policy: Path, tmp_path: Path, lr: float) -> None:
    """The passes after the step are not finite, or the engine cannot sample. Both end the run alike.

    The rates exceed what norms of the layers absorb. At 30 the processor decides whether anything overflows.
    """
    with pytest.raises(NotFiniteError, match="lower the learning rate"):
        fit(policy, tmp_path, lr=lr, iterations=8)


def test_a_learning_rate_that_explodes_later(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond float32 the step breaks the weights. One sentence and exit code 1 follow; the good checkpoint stays."""
    scheduler = ["--model.lr_scheduler", "torch.optim.lr_scheduler.MultiStepLR"]
    scheduler += ["--model.lr_scheduler.milestones", "[7, 7]"]  # the factor applies twice
    command = ["fit", "--config", config, *scheduler, "--model.lr_scheduler.gamma", "1e21", "--run.folder", tmp_path]
    command += ["--evaluation.every_n_iterations", "0", "--checkpoint.every_n_epochs", "1"]
    with pytest.raises(SystemExit) as ended:
        popo(*command)
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1
    assert said.startswith(
        "popo: the optimizer step of iteration 3, minibatch 2 made weights that are not finite; lower"
    )
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert said.endswith(
        f"; --run.resume true resumes from the newest checkpoint, {kept}, after iteration 2; "
        "--ckpt_path from an earlier one"
    )
    state = torch.load(kept, weights_only=True)
    assert state["global_step"] == 6 and all_finite(state["state_dict"].values())


def test_a_critic_that_breaks(policy: Path, tmp_path: Path) -> None:
    """Only the critic's gradient is not finite, but neither model takes the step."""

    class BreakCritic(Poison):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if self.seen == 2:
                hook = pl_module.value_model.head.weight.register_hook(lambda gradient: gradient * math.nan)
                self.undo = hook.remove

        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            if self.seen == 2:
                self.undo()

    poison = BreakCritic()
    fit(policy, tmp_path, callbacks=[poison], model={"critic": Critic(), "advantage": GAE()})
    assert_untouched(poison, 1)
    assert [each["outputs"]["skipped"] for each in poison.after] == [False, True, False, False, False, False]


def on_ranks(folder: str, strategy: str) -> dict[str, Any]:
    """Only rank 1 has a minibatch that is not finite, and later one that exceeds the limit."""
    poison = Poison(1, 3, 4, rank=1)
    module = PolicyModule(path=folder, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), max_skipped_steps=2)
    minibatches = [[rows_of(2 * step + rank, [3, 4]) for rank in range(2)] for step in range(6)]
    try:
        train(module, strategy, minibatches, [poison])
    except NotFiniteError as error:
        return {
            "error": str(error),
            "seen": poison.seen,
            "skipped": [each["outputs"]["skipped"] for each in poison.after],
            "around": [poison.before[1]["weights"], poison.after[1]["weights"], poison.after[2]["weights"]],
        }
    return {}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_skip_and_end_together(policy: Path, tmp_path: Path, strategy: str) -> None:
    found = on_two_ranks(on_ranks, tmp_path, str(policy), strategy)
    for of_rank in found:
        assert "2 optimizer steps in a row" in of_rank["error"]
        assert of_rank["seen"] == 5 and of_rank["skipped"] == [False, True, False, True]
        before, skipped, taken = of_rank["around"]
        assert same(before, skipped) and not same(skipped, taken)
    assert same(found[0]["around"], found[1]["around"])


def test_all_finite() -> None:
    sound = [torch.ones(3), torch.empty(0), torch.tensor([1, 2]), torch.ones(2, dtype=torch.bfloat16)]
    assert all_finite(sound) and all_finite([])
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert not all_finite([*sound, torch.tensor([0.0, bad], dtype=dtype)])


def test_the_limit_is_a_number_of_steps() -> None:
    with pytest.raises(SettingError, match=r"model\.max_skipped_steps is 0; .* at least 1 step"):
        PolicyModule(path="x/y", max_skipped_steps=0)
