"""Adapters with parts that store or set weights themselves: a critic, an average, slow and fast steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import fit
from torch import Tensor, nn

from popo_lightning.methods.ppo_ewma import ProximalAverage
from popo_lightning.methods.sfpo import SlowFastPolicy
from popo_lightning.model.critic import Critic
from popo_lightning.model.critic_heads import GaussianHead
from popo_lightning.model.critic_target import TargetCritic
from popo_lightning.model.loading import load_model
from popo_lightning.model.lora import Lora, adapters
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.replay.composer import OnPolicy

SMALL = Lora(r=3, alpha=12)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the frozen weights by the names of a model without adapters."""
    return {
        name.replace(".base_layer", ""): weight.detach()
        for name, weight in model.named_parameters()
        if ".lora_" not in name
    }


def assert_base_is_untouched(model: nn.Module, policy: Path) -> None:
    first = dict(load_model(policy, torch.float32).named_parameters())
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, first[name]), name
    assert all(float(weight.abs().max()) > 0 for weight in adapters(model).values()), "a B that is still 0"


@pytest.mark.slow
def test_a_critic_learns_by_adapters_of_its_own(policy: Path, tmp_path: Path) -> None:
    model = {"lora": SMALL, "critic": Critic(lr=1e-2), "advantage": GAE()}
    run = fit(policy, tmp_path, model=model, composer=OnPolicy(), lr=5e-3, iterations=2)
    assert_base_is_untouched(run.module.model, policy)
    trained = {name for name, weight in run.module.value_model.named_parameters() if weight.requires_grad}
    assert trained == {name for name in trained if ".lora_" in name or name.startswith("head.")} and len(trained) > 2
    assert float(run.module.value_model.head.weight.abs().max()) > 0
    own = adapters(run.module.value_model)
    assert all(float(weight.abs().max()) > 0 for weight in own.values())
    shared = {weight.data_ptr() for weight in adapters(run.module.model).values()}
    assert not shared & {weight.data_ptr() for weight in own.values()}
    assert all(row["train/value_loss"] > 0 for row in run.rows)


@pytest.mark.slow
def test_what_follows_the_critic_is_saved_beside_the_adapters(policy: Path, tmp_path: Path) -> None:
    target = TargetCritic(every=2, polyak=0.5, momentum=0.25)
    critic = Critic(lr=1e-2, value_clip=None, head=GaussianHead(), target=target)
    model = {"lora": SMALL, "critic": critic, "advantage": GAE(lam=0.9)}
    run = fit(policy, tmp_path, model=model, composer=OnPolicy(), lr=5e-3, iterations=2)
    copied, saved = run.module.value_target, run.module.state_dict()
    assert copied is not None and copied.speed is not None
    frozen = next(
        name for name in dict(run.module.value_model.named_parameters()) if name.endswith("base_layer.weight")
    )
    assert copied.model.get_parameter(frozen) is run.module.value_model.get_parameter(frozen)
    trained = {name for name, weight in run.module.value_model.named_parameters() if weight.requires_grad}
    kept = {name.removeprefix("value_target.") for name in saved if name.startswith("value_target.")}
    assert kept == {f"{part}.{name}" for part in ("model", "speed") for name in trained}
    assert "value_model.running_std" in saved and not any(name.endswith("base_layer.weight") for name in saved)
    assert float(saved["value_model.running_std"]) != float(torch.log(torch.tensor(2.0)))
    moved = [name for name in trained if copied.speed.get_parameter(name).any()]
    assert len(moved) == len(trained)


def test_an_average_of_the_policy_is_one_of_adapters(policy: Path, tmp_path: Path) -> None:
    average = ProximalAverage(center_of_mass=2.0)
    run = fit(policy, tmp_path, model={"lora": SMALL}, proximal=average, composer=OnPolicy(), lr=5e-3, iterations=2)
    assert_base_is_untouched(run.module.model, policy)
    assert average.average is not None and average.average.keys() == adapters(run.module.model).keys()
    moved = [not torch.equal(average.average[name], weight) for name, weight in adapters(run.module.model).items()]
    assert all(moved), "an average that is the newest weights"
    assert run.rows[-1]["policy/ratio_max"] > 1


def test_slow_and_fast_steps_interpolate_adapters(policy: Path, tmp_path: Path) -> None:
    hook = SlowFastPolicy(interpolation=0.5, z_threshold=None)
    run = fit(
        policy,
        tmp_path,
        model={"lora": SMALL},
        callbacks=[hook],
        composer=OnPolicy(),
        lr=5e-3,
        iterations=2,
        ppo_epochs=3,
    )
    assert_base_is_untouched(run.module.model, policy)
    assert all(row["engine/logp_gap_mean"] < 1e-5 for row in run.rows), "an engine that has not the merged weights"
