"""Models load and build correctly inside a device context, such as the one Lightning enters around configure_model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import POLICY, attached, random_model, random_vision_model, weights_of
from torch import Tensor

from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model.critic import Critic
from popo_lightning.model.critic_heads import GaussianHead
from popo_lightning.model.critic_target import TargetCritic
from popo_lightning.model.loading import load_model
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.objectives.regularizers import KL
from popo_lightning.policy import PolicyModule
from popo_lightning.toys.countdown_policy import CountdownWarmStart
from popo_lightning.toys.geometry_policy import GeometryWarmStart

ELSEWHERE = torch.device("meta")  # not the default device, as cuda:0 on a GPU machine


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)  # raises for a tensor on another device


def everything(model: torch.nn.Module) -> dict[str, Tensor]:
    """Includes buffers, because transformers computes rotary frequencies while it builds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("make", [lambda folder: random_model("qwen2", folder), random_vision_model])
def test_a_model_loads_as_outside(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path)
    outside = load_model(folder, torch.float32)
    with ELSEWHERE:
        inside = load_model(folder, torch.float32)
    assert same(everything(inside), everything(outside))


RECIPES: dict[str, tuple[type[WarmStart], dict[str, Any]]] = {
    "countdown": (CountdownWarmStart, POLICY | {"examples": 40 * 4, "batch_size": 4}),
    "geometry": (GeometryWarmStart, {"examples": 40, "batch_size": 1, "hidden_size": 32, "vision_hidden_size": 32}),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_warm_start_builds_as_outside(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = RECIPES[recipe]
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "outside"))
    outside = load_model(kind(**settings).folder(), torch.float32)
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "inside"))
    with ELSEWHERE:
        inside = kind(**settings).folder()
    assert inside.is_relative_to(tmp_path / "inside")
    assert same(everything(load_model(inside, torch.float32)), everything(outside))


def test_policy_critic_and_reference_are_as_outside(tmp_path: Path) -> None:
    folder = random_model("llama-tied", tmp_path)
    settings: dict[str, Any] = {
        "regularizers": [KL(0.1)],
        "advantage": GAE(lam=0.9),
        "critic": Critic(value_clip=None, head=GaussianHead(), heads=2, target=TargetCritic(momentum=0.5)),
    }
    outside = attached(PolicyModule(str(folder), **settings))
    with ELSEWHERE:
        inside = attached(PolicyModule(str(folder), **settings))
    assert same(weights_of(inside), weights_of(outside))
    for left, right in zip(inside._reference, outside._reference, strict=True):
        assert same(everything(left), everything(right))
    assert same(everything(inside.value_model), everything(outside.value_model))
    assert inside.value_target is not None and outside.value_target is not None
    assert same(everything(inside.value_target), everything(outside.value_target))
