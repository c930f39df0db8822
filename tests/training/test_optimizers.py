"""Adam uses one kernel unless settings decide otherwise. A resumed run's optimizer follows the settings."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import fit, method, popo
from torch import nn

from popo_lightning.cli.plan.optimizer_state import OptimizerState, optimizer_state
from popo_lightning.core.errors import SettingError
from popo_lightning.training.optimizers import check_optimizer, check_state, fuse, group_settings, made, obey


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((7, 5), (5,), (3, 2, 4))]


def steps(optimizer: torch.optim.Optimizer, first: int, count: int) -> list[torch.Tensor]:
    """Returns the weights after some steps with made-up gradients."""
    found = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + count):
        draw = torch.Generator().manual_seed(step)
        for parameter in found:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    return [parameter.detach().clone() for parameter in found]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_steps_are_the_plain_ones(kind: type[torch.optim.Adam]) -> None:
    plain, fused = (kind(parameters(), lr=1e-2, weight_decay=0.1) for _ in range(2))
    fuse(fused)
    assert [group["fused"] for group in fused.param_groups] == [True] and fused.defaults["fused"] is True
    torch.testing.assert_close(steps(fused, 0, 50), steps(plain, 0, 50), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("given", [{"fused": False}, {"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_what_was_given_stays(given: dict[str, bool]) -> None:
    optimizer = torch.optim.AdamW(parameters(), **given)  # type: ignore[arg-type]
    before = group_settings(optimizer)
    fuse(optimizer)
    assert group_settings(optimizer) == before


def test_other_optimizers_stay() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    before = group_settings(optimizer)
    fuse(optimizer)
    assert group_settings(optimizer) == before


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_a_checkpoint_of_either_kind_goes_on(before: bool, after: bool) -> None:
    """The step counts are where the kernel reads them, in the type in which it counts."""
    whole = torch.optim.AdamW(parameters(), lr=1e-2)
    expected = steps(whole, 0, 6)
    first = torch.optim.AdamW(parameters(), lr=1e-2, fused=before)
    weights = steps(first, 0, 3)
    saved = copy.deepcopy(first.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].double()
    second = torch.optim.AdamW([nn.Parameter(w) for w in weights], lr=3e-2, fused=after)
    present = [settings | {"lr": 1e-2} for settings in group_settings(second)]
    second.load_state_dict(saved)
    assert second.param_groups[0]["fused"] is before
    obey(second, present, scheduled=False)
    assert second.param_groups[0]["fused"] is after
    assert {state["step"].dtype for state in second.state.values()} == {torch.float32}
    torch.testing.assert_close(steps(second, 3, 3), expected, atol=2e-6, rtol=1e-5)


def test_a_scheduled_learning_rate_stays_where_it_is() -> None:
    for scheduled, lr in ((True, 0.5), (False, 0.1)):
        optimizer = torch.optim.SGD(parameters(), lr=0.1)
        present = group_settings(optimizer)
        optimizer.param_groups[0] |= {"lr": 0.5, "momentum": 0.9}
        obey(optimizer, present, scheduled)
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (lr, 0.0)


def test_a_training_is_fused_unless_told(policy: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    for name, given in (("fused", {}), ("told", {"fused": False})):

        def make(parameters: Any, lr: float, given: dict[str, bool] = given) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=lr, **given)  # type: ignore[arg-type]

        run = fit(policy, tmp_path / name, iterations=1, minibatches=1, optimizer=make)  # one step with one gradient
        found.append((run.trainer.optimizers[0].param_groups[0]["fused"], run.weights))
    assert [fused for fused, _ in found] == [True, False]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


def test_the_command_line_takes_fused(config: Path, tmp_path: Path) -> None:
    optimizer = '{"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "fused": false}}'
    settings = ["--model.optimizer", optimizer, "--trainer.max_epochs", "1", "--run.folder", tmp_path]
    cli = popo("fit", "--config", config, *method("grpo"), *settings)
    assert cli.trainer.optimizers[0].param_groups[0]["fused"] is False


@pytest.mark.parametrize(
    ("there", "here", "word"),
    [
        (
            partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            torch.optim.Adam,
            "is Adam, which needs exp_avg, exp_avg_sq, step",
        ),
        (torch.optim.Adam, partial(torch.optim.Adam, amsgrad=True), "max_exp_avg_sq"),
        (torch.optim.Adam, partial(torch.optim.SGD, lr=0.1, momentum=0.9), "is SGD, which needs momentum_buffer"),
        (torch.optim.Adam, torch.optim.AdamW, None),
        (torch.optim.Adam, partial(torch.optim.SGD, lr=0.1), None),
        (partial(torch.optim.SGD, lr=0.1), torch.optim.Adam, None),  # nothing was saved and nothing is missing
    ],
)
def test_a_checkpoint_of_another_optimizer(there: Any, here: Any, word: str | None) -> None:
    before = there(parameters())
    steps(before, 0, 1)
    checkpoint = {"optimizer_states": [before.state_dict()]}
    drawn = torch.random.get_rng_state()
    if word is None:
        check_state(here, checkpoint)
    else:
        with pytest.raises(SettingError, match=word):
            check_state(here, checkpoint)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    check_state(here, {})


def test_an_optimizer_that_cannot_be_tried_is_not_checked() -> None:
    def picky(_: Any) -> torch.optim.Optimizer:
        raise ValueError("matrices only")

    before = torch.optim.Adam(parameters())
    steps(before, 0, 1)
    check_state(picky, {"optimizer_states": [before.state_dict()]})


class CompiledMomentum(torch.optim.Optimizer):
    """Its step is compiled, as torchao's are, by a compiler that is missing here."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})

        def compiler(graph: Any, inputs: Any) -> Any:
            raise AssertionError("compiled")

        self.compiled = torch.compile(lambda momentum, gradient: momentum.add_(gradient), backend=compiler)

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("momentum", torch.zeros_like(parameter))
            self.compiled(state["momentum"], parameter.grad)


def test_a_trial_step_compiles_nothing() -> None:
    """A kernel for the CPU would take minutes at each start, and the training steps elsewhere."""
    assert optimizer_state(CompiledMomentum, torch.float32, on_gpu=True) == OptimizerState(4.0, 0)
    before = torch.optim.Adam(parameters())
    steps(before, 0, 1)
    with pytest.raises(SettingError, match="is CompiledMomentum, which needs momentum"):
        check_state(CompiledMomentum, {"optimizer_states": [before.state_dict()]})
    with pytest.raises(Exception, match="compiled"):
        steps(CompiledMomentum(parameters()), 0, 1)


# -- before a model loads ------------------------------------------------------------------------------------------


def adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=1e-3)


class OnAnotherDevice(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise RuntimeError("this kernel is for CUDA")


def test_optimizers_and_schedulers_that_can_be_stepped() -> None:
    random = torch.random.get_rng_state()
    for name in ("SGD", "Adam", "AdamW", "Adafactor", "RMSprop", "Muon"):
        kind = getattr(torch.optim, name, torch.optim.SGD)
        check_optimizer(lambda groups, kind=kind: kind(groups, lr=1e-3), None)
    check_optimizer(adam, lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer))
    check_optimizer(OnAnotherDevice, None)  # a device that is missing here may exist where the run is
    assert torch.equal(torch.random.get_rng_state(), random)


def test_optimizers_and_schedulers_that_cannot() -> None:
    schedulers = torch.optim.lr_scheduler
    for make, make_scheduler, said in (
        (
            lambda groups: torch.optim.SGD(groups, lr=-1.0),
            None,
            "model.optimizer cannot be made: Invalid",
        ),
        (torch.optim.LBFGS, None, "model.optimizer is LBFGS, which takes no step from a gradient alone"),
        (torch.optim.SparseAdam, None, "model.optimizer is SparseAdam, but gradients here are dense"),
        (adam, schedulers.ReduceLROnPlateau, "model.lr_scheduler is ReduceLROnPlateau, which needs more than"),
        (adam, lambda optimizer: schedulers.OneCycleLR(optimizer, 1.0), "model.lr_scheduler cannot be made: You must"),
    ):
        with pytest.raises(SettingError, match=said):
            check_optimizer(make, make_scheduler)
    with pytest.raises(SettingError, match=r"model.optimizer cannot be made: x"), made("model.optimizer"):
        raise ValueError("x")


def test_a_scheduler_on_the_command_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plateau = ["lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor", "reward/score"]
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, "--model.lr_scheduler", *plateau)
    assert stopped.value.code == 2
    assert "model.lr_scheduler is ReduceLROnPlateau" in capsys.readouterr().err
