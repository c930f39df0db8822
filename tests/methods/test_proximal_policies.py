"""PPO-EWMA's average against its closed form, and AReaL's interpolation by hand, both also in real runs."""

from __future__ import annotations

import copy
import io
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers.groups import group, response
from helpers.tiny_models import Run, fit, method, metrics, popo
from lightning.pytorch.strategies import ModelParallelStrategy
from objectives.test_identities import one_response
from torch import Tensor, nn

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.timing import PhaseClock
from popo_lightning.methods.areal import LogLinear, prox_alpha
from popo_lightning.methods.ppo_ewma import ProximalAverage, for_smaller_batch
from popo_lightning.model.padded_rows import pad_rows
from popo_lightning.objectives.advantages import GroupNormalized
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.weights import TruncatedIS
from popo_lightning.proximal.kept_weights import refuse_sharded, restore, snapshot
from popo_lightning.replay.composer import Filter, OnPolicy

# -- the average -----------------------------------------------------------------------------------------------


def closed_form(weights: list[Tensor], beta: float) -> Tensor:
    """Returns the normalized exponential average: the newest weight is 1, the one before it beta, and so on."""
    ages = torch.arange(len(weights) - 1, -1, -1, dtype=torch.float64)
    share = beta**ages / (beta**ages).sum()
    return sum(s * w.double() for s, w in zip(share, weights, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("center_of_mass", [0.0, 1.0, 8.0, 100.0])
def test_average_is_the_closed_form(center_of_mass: float) -> None:
    torch.manual_seed(0)
    model, average = nn.Linear(3, 2), ProximalAverage(center_of_mass)
    average.average = snapshot(model)
    seen = [model.weight.detach().clone()]
    for _ in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        average.add(model)
        seen.append(model.weight.detach().clone())
        expected = closed_form(seen, 1 - 1 / (center_of_mass + 1))
        assert torch.allclose(average.average["weight"].double(), expected, atol=1e-5)


def test_average_by_hand() -> None:
    """Center of mass 1 gives beta 1/2. The average of 1, 4, 7 is (1/4 + 4/2 + 7) / (7/4) = 9.25 / 1.75."""
    model, average = nn.Linear(1, 1, bias=False), ProximalAverage(1.0)
    nn.init.constant_(model.weight, 1.0)
    average.average = snapshot(model)
    for value in (4.0, 7.0):
        nn.init.constant_(model.weight, value)
        average.add(model)
    assert average.average["weight"].item() == pytest.approx(9.25 / 1.75)
    assert average.mass == 1.75


def test_centre_of_mass_is_the_mean_age() -> None:
    beta = ProximalAverage(8.0).beta
    assert beta == pytest.approx(8 / 9)
    ages = torch.arange(2000, dtype=torch.float64)
    assert float((ages * beta**ages).sum() / (beta**ages).sum()) == pytest.approx(8.0)


def test_frozen_weights_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(snapshot(model)) == ["weight"]


def test_putting_keeps_the_parameters_themselves() -> None:
    model = nn.Linear(2, 2)
    before, weight = snapshot(model), model.weight
    nn.init.zeros_(model.weight)
    restore(before, model)
    assert model.weight is weight and torch.equal(model.weight, before["weight"]) and weight.requires_grad


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("adam", (5e-4, 32.0)), ("sgd", (2.5e-4, 32.0))]
)  # 1e-3 / 2 and 1e-3 / 4; 8 x 4
def test_for_smaller_batch(optimizer: Any, expected: tuple[float, float]) -> None:
    assert for_smaller_batch(1e-3, 8.0, 4.0, optimizer) == pytest.approx(expected)
    assert for_smaller_batch(*expected, 0.25, optimizer) == pytest.approx((1e-3, 8.0))


@pytest.mark.parametrize("settings", [(1e-3, 8.0, 0.0), (1e-3, 8.0, 4.0, "adagrad")])
def test_for_smaller_batch_refuses(settings: Any) -> None:
    with pytest.raises(SettingError):
        for_smaller_batch(*settings)


@pytest.mark.parametrize("center_of_mass", [-1.0, float("inf"), float("nan")])
def test_refuses_a_centre_of_mass(center_of_mass: float) -> None:
    with pytest.raises(SettingError, match=r"^ProximalAverage\.center_of_mass is"):
        ProximalAverage(center_of_mass)


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(SettingError, match="ModelParallelStrategy"):
        refuse_sharded(SimpleNamespace(strategy=ModelParallelStrategy()), "proximal ProximalAverage")  # type: ignore[arg-type]


class Averages(L.Callback):
    """Records the weights after every step, and compares each minibatch's prox with their average's log-probs."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.weights: list[dict[str, Tensor]] = []
        self.worst = self.moved = 0.0
        self.stepped: list[bool] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.weights = [snapshot(pl_module.model)]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert all(torch.equal(weight, self.weights[-1][name]) for name, weight in snapshot(pl_module.model).items())
        averaged = copy.deepcopy(pl_module.model)
        restore({name: closed_form([w[name] for w in self.weights], self.beta) for name in self.weights[0]}, averaged)
        for row, prox in zip(batch.rows(), batch.recorded["prox_logp"], strict=True):
            with torch.no_grad():
                expected = one_response(averaged, row.prompt_ids, row.response.token_ids)
                present = one_response(pl_module.model, row.prompt_ids, row.response.token_ids)
            self.worst = max(self.worst, float((expected - prox).abs().max()))
            self.moved = max(self.moved, float((present - prox).abs().max()))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.stepped.append(outputs["stepped"])
        if outputs["stepped"]:
            self.weights.append(snapshot(pl_module.model))


def test_prox_of_a_run_is_the_averages(policy: Path, tmp_path: Path) -> None:
    """Filter leaves some minibatches without groups. These take no step and do not count."""
    average, watch = ProximalAverage(3.0), Averages(0.75)
    settings: dict[str, Any] = {"problems_per_iteration": 4, "group_size": 2, "minibatches": 3}
    weight = Objective(behave_weight=TruncatedIS(cap=100.0, correct_fresh=True))
    fit(policy, tmp_path, objective=weight, composer=Filter(), proximal=average, callbacks=[watch], **settings)
    assert 2 < sum(watch.stepped) < 9
    assert watch.worst < 1e-4 < 0.01 < watch.moved
    assert average.mass == pytest.approx(sum(0.75**age for age in range(len(watch.weights))))


def test_average_of_the_newest_alone_is_no_trust_region(policy: Path, tmp_path: Path) -> None:
    """With center of mass 0, prox is the policy before each step, so every ratio is 1."""
    run = fit(policy, tmp_path, composer=OnPolicy(), proximal=ProximalAverage(0.0))
    assert all(row["policy/ratio_max"] == pytest.approx(1, abs=1e-4) for row in run.rows)
    behind = fit(policy, tmp_path / "behind", composer=OnPolicy(), proximal=ProximalAverage(8.0))
    assert all(row["policy/ratio_max"] > 1.01 for row in behind.rows[1:])


EVERY_STEP = ["--checkpoint.every_n_epochs", "null", "--checkpoint.every_n_train_steps", "1"]
EVERY_STEP += ["--checkpoint.filename", "{step}"]


def weights_in(folder: Path, step: int) -> dict[str, Tensor]:
    (path,) = (folder / "checkpoints").glob(f"*step={step}.ckpt")
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_ewma", "areal"])
def test_an_interrupted_run_goes_on_exactly(name: str, config: Path, tmp_path: Path) -> None:
    """It resumes in the middle of the second iteration of three minibatches, and after this iteration."""
    command = ["fit", "--config", config, *method(name), *EVERY_STEP, "--checkpoint.save_top_k", "-1"]
    command += ["--trainer.max_epochs", "3"]
    popo(*command, "--run.folder", tmp_path / "whole")
    for step in (4, 6):
        shutil.copytree(tmp_path / "whole", tmp_path / f"{step}")
        for path in (tmp_path / f"{step}" / "checkpoints").glob("*.ckpt"):
            if int(path.stem.split("step=")[1]) > step:
                path.unlink()
        popo(*command, "--run.folder", tmp_path / f"{step}", "--run.resume", "true")
        assert metrics(tmp_path / f"{step}") == metrics(tmp_path / "whole")
        left, right = weights_in(tmp_path / f"{step}", 9), weights_in(tmp_path / "whole", 9)
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_state_of_the_average_is_plain() -> None:
    model, average = nn.Linear(2, 2), ProximalAverage(8.0)
    average.average = snapshot(model)
    average.add(model)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    again = ProximalAverage(8.0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.mass == average.mass == pytest.approx(1 + 8 / 9)
    assert again.average is not None and torch.equal(again.average["weight"], average.average["weight"])


# -- the interpolation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("age", "alpha"), [(0, 0.0), (1, 0.0), (2, 0.5), (3, 2 / 3), (10, 0.9)])
def test_share_by_hand(age: int, alpha: float) -> None:
    """As in AReaL, during an update the policy has the version of its start, and prox is one version older."""
    assert prox_alpha(age) == pytest.approx(alpha)


def test_shares_zero_and_one_are_behave_and_the_policy() -> None:
    """A share of one half gives the mean of the log-probs, which is the geometric mean of the probabilities."""
    minibatch = Minibatch([group(0), group(1)], version=0, index=0)
    minibatch.recorded["prox_alpha"] = list(torch.tensor([0.0, 1.0, 0.5, 0.25]))
    part = pad_rows(minibatch.rows())
    logp = torch.tensor([[-1.0, -2.0]]).expand(4, 2)
    behave = torch.full((2,), -0.5)
    prox = part.inputs(logp).prox_logp
    by_place = {int(index): row for index, row in zip(part.index, prox, strict=True)}
    assert torch.equal(by_place[0], behave) and torch.equal(by_place[1], logp[0])
    assert torch.allclose(by_place[2], torch.tensor([-0.75, -1.25]))
    assert torch.allclose(by_place[3], torch.tensor([-0.625, -0.875]))


class Shares(L.Callback):
    def __init__(self) -> None:
        self.found: list[tuple[int, int, float]] = []  # (age, steps taken, share)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert "prox_logp" not in batch.recorded
        ages = [batch.version - each.version for each in batch.groups for _ in each.responses]
        shares = batch.recorded["prox_alpha"]
        self.found += [(age, batch.index, float(share)) for age, share in zip(ages, shares, strict=True)]


def interpolated(policy: Path, folder: Path, **settings: Any) -> tuple[Run, Shares]:
    shares = Shares()
    data = {"minibatches": 2, "ppo_epochs": 2, "weight_sync_interval": 3} | settings
    return fit(policy, folder, composer=OnPolicy(), proximal=LogLinear(), callbacks=[shares], **data), shares


def test_shares_of_a_run(policy: Path, tmp_path: Path) -> None:
    """Rollouts are up to two versions old, and an iteration has four steps."""
    run, shares = interpolated(policy, tmp_path)
    assert {(age, index) for age, index, _ in shares.found} == {(age, index) for age in range(3) for index in range(4)}
    assert {(age, share) for age, _, share in shares.found} == {(0, 0.0), (1, 0.0), (2, 0.5)}
    assert all("time/prox" not in row for row in run.rows)


def test_a_group_of_several_versions() -> None:
    mixed = group(0, version=2)
    mixed.responses[1] = response()
    mixed.responses.append(replace(response(), version=1))
    first, later = Minibatch([mixed], version=3, index=0), Minibatch([mixed], version=4, index=1)
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(pending=[later], clock=PhaseClock()))
    LogLinear().on_train_batch_start(trainer, None, first, 0)  # once for all minibatches of the iteration
    assert first.recorded["prox_alpha"] == pytest.approx([0, 0, 1 / 2])
    assert later.recorded["prox_alpha"] == pytest.approx([1 / 2, 1 / 2, 2 / 3])
    later.recorded.clear()
    LogLinear().on_train_batch_start(trainer, None, later, 1)
    assert not later.recorded


def test_fresh_rows_have_no_weight_and_behave_as_their_centre(policy: Path, tmp_path: Path) -> None:
    """Without delay the interpolation is GRPO around the engine's log-probs, up to the engine's rounding."""
    run, _ = interpolated(policy, tmp_path / "areal", weight_sync_interval=1, ppo_epochs=1)
    plain = fit(policy, tmp_path / "grpo", composer=OnPolicy(), minibatches=2)
    for left, right in zip(run.rows, plain.rows, strict=True):
        assert left["train/loss"] == pytest.approx(right["train/loss"], abs=1e-4)
        assert left["policy/ratio_mean"] == pytest.approx(right["policy/ratio_mean"], abs=1e-4)


def test_an_advantage_that_needs_prox_is_refused(policy: Path, tmp_path: Path) -> None:
    class NeedsProx(GroupNormalized):
        needs_prox = True

    with pytest.raises(SettingError, match=r"LogLinear.*NeedsProx"):
        fit(policy, tmp_path, composer=OnPolicy(), proximal=LogLinear(), model={"advantage": NeedsProx()})
