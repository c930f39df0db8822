"""SFPO's three stages and ReMix's reincarnation in real runs: the weights themselves, and exact resuming."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.tiny_models import Run, fit, method, metrics, popo
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.methods.remix import Reincarnation
from popo_lightning.methods.sfpo import SlowFastPolicy
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import KL
from popo_lightning.proximal.kept_weights import Weights, snapshot
from popo_lightning.proximal.parameter_hook import ParameterHook
from popo_lightning.proximal.snapshot import ProximalSnapshot
from popo_lightning.replay.composer import Filter, OnPolicy


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Watch(L.Callback):
    """Records weights and Adam's first moments before and after every step, as later callbacks see them."""

    def __init__(self) -> None:
        self.before: list[Weights] = []
        self.after: list[Weights] = []
        self.groups: list[int] = []
        self.stepped: list[bool] = []
        self.moments: list[tuple[list[Tensor], list[Tensor]]] = []  # (before, after)
        self.reference: list[Weights | None] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(snapshot(pl_module.model))
        self.groups.append(len(batch.groups))
        self.reference.append(snapshot(pl_module._reference[0].requires_grad_(True)) if pl_module._reference else None)
        self._moments = self._read(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append(snapshot(pl_module.model))
        self.stepped.append(outputs["stepped"])
        self.moments.append((self._moments, self._read(trainer)))

    def _read(self, trainer: L.Trainer) -> list[Tensor]:
        return [state["exp_avg"].clone() for state in trainer.optimizers[0].state.values()]


def watched(policy: Path, folder: Path, *hooks: L.Callback, **settings: Any) -> tuple[Run, Watch]:
    watch = Watch()
    composer = settings.pop("composer", OnPolicy())
    return fit(policy, folder, composer=composer, callbacks=[*hooks, watch], **settings), watch


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


# -- SFPO ------------------------------------------------------------------------------------------------------


def test_without_fast_sweeps_it_is_grpo(policy: Path, tmp_path: Path) -> None:
    plain = fit(policy, tmp_path / "grpo", composer=OnPolicy())
    hook = SlowFastPolicy(interpolation=0.5, entropy_window=2, z_threshold=0.1)
    slow = fit(policy, tmp_path / "sfpo", composer=OnPolicy(), callbacks=[hook])
    assert same(plain.weights, slow.weights) and plain.rows == slow.rows


def test_goes_part_of_the_way_before_the_slow_sweep(policy: Path, tmp_path: Path) -> None:
    """With two minibatches, two fast epochs and a slow one, steps 0 to 3 are fast, and 4 and 5 slow."""
    _, watch = watched(policy, tmp_path, SlowFastPolicy(interpolation=0.8), ppo_epochs=3, iterations=2)
    assert len(watch.before) == 12
    for first in (0, 6):
        start, end, slow = watch.before[first], watch.after[first + 3], watch.before[first + 4]
        for name in start:
            assert torch.allclose(slow[name], start[name] + 0.8 * (end[name] - start[name]), atol=1e-7)
        assert max(float((slow[name] - end[name]).abs().max()) for name in start) > 1e-4
    jumps = [not same(watch.after[step], watch.before[step + 1]) for step in range(11)]
    assert jumps == [step in (3, 9) for step in range(11)]


def test_the_optimizer_is_not_rewound(policy: Path, tmp_path: Path) -> None:
    _, watch = watched(policy, tmp_path, SlowFastPolicy(), ppo_epochs=2, iterations=1)
    for step in range(3):
        after, before = watch.moments[step][1], watch.moments[step + 1][0]
        assert after and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_all_the_way_is_the_same_as_no_hook(policy: Path, tmp_path: Path) -> None:
    plain = fit(policy, tmp_path / "ppo_epochs", composer=OnPolicy(), ppo_epochs=3)
    hooked = fit(policy, tmp_path / "sfpo", composer=OnPolicy(), callbacks=[SlowFastPolicy(1.0)], ppo_epochs=3)
    assert same(plain.weights, hooked.weights) and plain.rows == hooked.rows


def test_no_way_at_all_begins_the_slow_sweep_at_the_start(policy: Path, tmp_path: Path) -> None:
    _, watch = watched(policy, tmp_path, SlowFastPolicy(0.0), ppo_epochs=2, iterations=1)
    assert same(watch.before[0], watch.before[2]) and not same(watch.before[0], watch.before[3])


@pytest.mark.parametrize(
    ("entropies", "threshold", "rises"),
    [
        # The mean is 4/3, the spread sqrt(2)/3 = 0.471 (the sample's would be 0.577): z = 0.667 / 0.471 = 1.414.
        ([1.0, 1.0, 2.0], 1.0, True),
        ([1.0, 1.0, 2.0], 1.4, True),
        ([1.0, 1.0, 2.0], 1.42, False),
        ([1.0, 2.0, 1.0], 0.1, False),  # below the mean: the test is one-sided
        ([2.0, 2.0, 1.0], 1.0, False),
        ([1.0, 2.0], 0.1, False),  # the window is not full
        ([1.0, 1.0, 1.0], 1.0, False),  # no spread, no rise
    ],
)
def test_rise_of_entropy_by_hand(entropies: list[float], threshold: float, rises: bool) -> None:
    hook = SlowFastPolicy(entropy_window=3)
    hook.entropies = entropies
    assert hook._rises(threshold) is rises


def test_entropy_is_the_runs(policy: Path, tmp_path: Path) -> None:
    hook = SlowFastPolicy(entropy_window=3, z_threshold=50.0)
    run = fit(policy, tmp_path, composer=OnPolicy(), callbacks=[hook], ppo_epochs=2, iterations=4)
    assert hook.entropies == pytest.approx([row["policy/entropy"] for row in run.rows[1:]], rel=1e-5)
    assert not hook.stopped


def test_once_stopped_it_is_grpo_with_nothing_in_between(policy: Path, tmp_path: Path) -> None:
    """Emptied minibatches do not change weights, optimizer or learning rate, so the run equals one with one epoch."""
    model = {"lr_scheduler": constant}
    plain, alone = watched(policy, tmp_path / "grpo", iterations=3, model=model)
    hook = SlowFastPolicy()
    hook.stopped = True
    run, watch = watched(policy, tmp_path / "sfpo", hook, ppo_epochs=3, iterations=3, model=model)
    assert same(plain.weights, run.weights)
    assert watch.stepped == [True, True, False, False, False, False] * 3
    assert [count > 0 for count in watch.groups] == watch.stepped
    assert run.trainer.global_step == plain.trainer.global_step == 6
    rates = [each.trainer.optimizers[0].param_groups[0]["lr"] for each in (run, plain)]
    assert rates == [pytest.approx(1e-3 * 0.9**6)] * 2
    for step, stepped in enumerate(watch.stepped):
        assert same(watch.before[step], watch.after[step]) is not stepped
        if not stepped:
            assert all(torch.equal(a, b) for a, b in zip(*watch.moments[step], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(watch.moments[-1][1], alone.moments[-1][1], strict=True))


class RisesAtTheFourth(SlowFastPolicy):
    """Sees scripted entropies that rise after the fourth iteration, whatever the policy's entropies are."""

    script = (2.0, 1.5, 1.0, 1.1)

    def __init__(self) -> None:
        super().__init__(entropy_window=2, z_threshold=0.9)
        self.looked = 0

    def _rises(self, threshold: float) -> bool:
        self.entropies[-1] = self.script[self.looked]
        self.looked += 1
        return super()._rises(threshold)


def test_stops_for_good(policy: Path, tmp_path: Path) -> None:
    """With a window of two, z is always 1 at a rise, so the first rise stops it. The fast epochs never return."""
    hook = RisesAtTheFourth()
    _, watch = watched(policy, tmp_path, hook, ppo_epochs=2, iterations=6, lr=3e-4)
    assert hook.stopped and hook.looked == 4 and list(hook.entropies) == [1.0, 1.1]
    assert watch.stepped == [True] * 4 * 4 + [True, True, False, False] * 2


def test_null_never_stops(policy: Path, tmp_path: Path) -> None:
    hook = SlowFastPolicy(entropy_window=2, z_threshold=None)
    run = fit(policy, tmp_path, composer=OnPolicy(), callbacks=[hook], ppo_epochs=2, iterations=8, lr=3e-4)
    assert run.trainer.global_step == 32 and not hook.stopped


def test_an_iteration_without_groups(policy: Path, tmp_path: Path) -> None:
    """A batch may be empty, and so may its minibatches. The remaining steps follow the same stages."""
    settings: dict[str, Any] = {"problems_per_iteration": 2, "group_size": 2, "minibatches": 2, "ppo_epochs": 2}
    run, watch = watched(policy, tmp_path, SlowFastPolicy(0.5), composer=Filter(), iterations=6, **settings)
    assert 0 < sum(watch.stepped) < 24 and run.trainer.global_step == sum(watch.stepped)
    for first in range(0, 24, 4):
        start, end, slow = watch.before[first], watch.after[first + 1], watch.before[first + 2]
        assert all(torch.allclose(slow[n], start[n] + 0.5 * (end[n] - start[n]), atol=1e-7) for n in start)


def copy_until(whole: Path, step: int, target: Path) -> None:
    """Copies the run's folder without the checkpoints written after a step."""
    shutil.copytree(whole, target)
    for path in (target / "checkpoints").glob("*.ckpt"):
        if int(path.stem.split("step=")[1]) > step:
            path.unlink()


def checkpoint(folder: Path, step: int) -> dict[str, Any]:
    (path,) = (folder / "checkpoints").glob(f"*step={step}.ckpt")
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def assert_resumes(command: list[str | Path], folder: Path, steps: list[int], last: int) -> None:
    """Checks that the run, resumed from the checkpoint of each step, equals the uninterrupted one."""
    command = [*command, "--checkpoint.every_n_epochs", "null", "--checkpoint.every_n_train_steps", "1"]
    command += ["--checkpoint.save_top_k", "-1", "--checkpoint.filename", "{step}"]
    popo(*command, "--run.folder", folder / "whole")
    end = checkpoint(folder / "whole", last)["state_dict"]
    for step in steps:
        copy_until(folder / "whole", step, folder / str(step))
        popo(*command, "--run.folder", folder / str(step), "--run.resume", "true")
        assert metrics(folder / str(step)) == metrics(folder / "whole")
        assert same(checkpoint(folder / str(step), last)["state_dict"], end)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(config: Path, tmp_path: Path) -> None:
    """There are three minibatches, a fast and a slow epoch.

    It resumes inside the fast epoch, before and inside the slow one, and after.
    """
    command: list[str | Path] = ["fit", "--config", config, *method("sfpo"), "--data.ppo_epochs", "2"]
    command += ["--trainer.max_epochs", "3", "--parameter_hook.entropy_window", "2"]
    assert_resumes([*command, "--parameter_hook.z_threshold", "null"], tmp_path, [8, 9, 10, 12], 18)
    kept_starts = [_hook_state(tmp_path / "whole", step)["start"] is not None for step in range(6, 13)]
    assert kept_starts == [False, True, True, True, False, False, False]


@pytest.mark.slow
def test_a_run_that_stops_goes_on_exactly(config: Path, tmp_path: Path) -> None:
    """It resumes before and after the entropy has risen, also inside iterations whose entropy is half summed."""
    command: list[str | Path] = ["fit", "--config", config, *method("sfpo"), "--data.ppo_epochs", "2"]
    command += ["--trainer.max_epochs", "3", "--parameter_hook", "methods.test_parameter_hooks.StopsEarly"]
    assert_resumes(command, tmp_path, [4, 10, 12, 14], 15)
    assert [_hook_state(tmp_path / "whole", step)["stopped"] for step in (6, 11, 12, 15)] == [False, False, True, True]
    entropies = [_hook_state(tmp_path / name, 15)["entropies"] for name in ("whole", "4", "10")]
    assert len(entropies[0]) == 2 and entropies[0] == entropies[1] == entropies[2]


class StopsEarly(SlowFastPolicy):
    """Stops as soon as there are two entropies, whatever their values."""

    def __init__(self) -> None:
        super().__init__(entropy_window=2)
        self.z_threshold = -10.0


def _hook_state(folder: Path, step: int) -> dict[str, Any]:
    states = checkpoint(folder, step)["callbacks"]
    (found,) = (state for state in states.values() if isinstance(state, dict) and "entropies" in state)
    return dict(found)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"interpolation": 1.1}, "interpolation"),
        ({"interpolation": -0.1}, "interpolation"),
        ({"entropy_window": 1}, "entropy_window"),
        ({"z_threshold": 0.0}, "z_threshold"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=f"^SlowFastPolicy.{name} is"):
        SlowFastPolicy(**settings)


# -- reincarnation ---------------------------------------------------------------------------------------------


def with_kl() -> Objective:
    return Objective(regularizers=[KL(0.1)])


def test_the_reference_becomes_the_policy(policy: Path, tmp_path: Path) -> None:
    _, watch = watched(policy, tmp_path, Reincarnation(2), objective=with_kl(), iterations=4)
    base, then = watch.before[0], watch.before[4]  # two steps per iteration
    assert not same(base, then)
    assert [same(reference or {}, base) for reference in watch.reference] == [True] * 4 + [False] * 4
    assert [same(reference or {}, then) for reference in watch.reference] == [False] * 4 + [True] * 4


def test_it_matters(policy: Path, tmp_path: Path) -> None:
    weights = []
    for hook in (ParameterHook(), Reincarnation(1), Reincarnation(9)):
        run = fit(policy, tmp_path / str(len(weights)), composer=OnPolicy(), objective=with_kl(), callbacks=[hook])
        weights.append(run.weights)
    assert not same(weights[0], weights[1]) and same(weights[0], weights[2])


def test_it_needs_a_reference(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Reincarnation"):
        fit(policy, tmp_path, callbacks=[Reincarnation(1)])
    with pytest.raises(SettingError, match=r"^Reincarnation\.iteration is -1"):
        Reincarnation(-1)


@pytest.mark.slow
def test_a_resumed_run_has_the_reference_it_had(config: Path, tmp_path: Path) -> None:
    """The checkpoints are before the exchange, at its first step, and after it."""
    hook = "popo_lightning.methods.remix.Reincarnation"
    command: list[str | Path] = ["fit", "--config", config, *method("grpo"), "--trainer.max_epochs", "4"]
    command += ["--parameter_hook", hook, "--parameter_hook.iteration", "2"]
    command += ["--model.regularizers+", "popo_lightning.objectives.regularizers.KL"]
    command += ["--model.regularizers.coefficient", "0.1"]
    assert_resumes(command, tmp_path, [6, 7, 9], 12)


class Counting(ParameterHook):
    """Counts the steps, and the odd ones by another name."""

    state = ("steps",)

    def __init__(self) -> None:
        self.steps = self.odd = 0
        self.policy: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.odd += 2  # before training, so that it is not noticed by itself
        self.policy = pl_module  # saved by the trainer

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1
        self.odd += self.steps % 2


class Remembers(ProximalSnapshot):
    """Keeps the last version without naming it."""

    last = -1

    def attach(self, minibatches: Sequence[Minibatch], policy: PolicyModel) -> None:
        super().attach(minibatches, policy)
        self.last = minibatches[0].version


class Misspelt(ParameterHook):
    state = ("setps",)


def test_an_attribute_that_is_not_there_is_refused_at_the_start(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="parameter_hook Misspelt has no 'setps'"):
        fit(policy, tmp_path, composer=OnPolicy(), callbacks=[Misspelt()], iterations=1)


def test_hooks_and_proximal_policies_keep_what_they_name_and_forgotten_attributes_are_named(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = fit(policy, tmp_path, composer=OnPolicy(), callbacks=[Counting(), Remembers()], iterations=2)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")  # says nothing twice
    told = [record.message for record in caplog.records if "neither its `state`" in record.message]
    assert [each.split(", which")[0] for each in told] == [
        "parameter_hook Counting changes 'odd'",
        "proximal Remembers changes 'last'",
    ]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert [state for name, state in saved.items() if "Counting" in name] == [{"steps": run.trainer.global_step}]


def test_the_default_does_nothing(policy: Path, tmp_path: Path) -> None:
    plain = fit(policy, tmp_path / "without", composer=OnPolicy())
    hooked = fit(policy, tmp_path / "with", composer=OnPolicy(), callbacks=[ParameterHook()])
    assert same(plain.weights, hooked.weights)
    assert copy.deepcopy(ParameterHook()).state_dict() == {}
