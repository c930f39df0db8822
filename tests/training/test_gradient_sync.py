"""Two ranks exchange gradients once per step and train as one process does, whatever their micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import Steps, on_two_ranks, rows_of, train, whole_tensors
from helpers.tiny_models import random_model

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.methods.remix import ConvexKL
from popo_lightning.model.critic import Critic
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.policy import PolicyModule

# One rank has more micro-batches, then the other, then one rank has none, then both have none.
STEPS = [
    (rows_of(1, [2, 7, 1]), rows_of(2, [4])),
    (rows_of(3, [3]), rows_of(4, [2, 2, 9, 1, 5])),
    (rows_of(5, [3, 1]), Minibatch([], 2, 2)),
    (Minibatch([], 2, 3), Minibatch([], 2, 3)),
]
WAYS = [("ddp", "step"), ("ddp", "micro_batch"), ("fsdp2", "step"), ("fsdp2", "micro_batch")]


def trained(folder: Path, strategy: str, gradient_sync: str = "step") -> dict[str, Any]:
    """Returns the results of the steps, with a critic and a reference. A tied embedding's gradient has two sources."""
    steps = Steps()
    critic: dict[str, Any] = {"critic": Critic(lr=1e-3), "advantage": GAE(whiten=False)}
    critic["regularizers"] = [ConvexKL(0.5)]
    # With its usual eps, Adam would turn a gradient that is only rounding into a step of the learning rate.
    module = PolicyModule(
        path=str(folder),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3),
        micro_batch_tokens=20,
        gradient_sync=gradient_sync,
        **critic,
    )
    together = [(Minibatch(a.groups + b.groups, 2, a.index),) for a, b in STEPS]
    passes: list[int] = []
    real = module.manual_backward
    module.manual_backward = lambda loss, *a, **k: (passes.append(1), real(loss, *a, **k))[1]  # type: ignore[method-assign]
    module, trainer = train(module, strategy, together if strategy == "one" else STEPS, [steps])
    head, embedding = module.model.lm_head.weight, module.model.get_input_embeddings().weight
    found = {name: getattr(steps, name) for name in ("gradients", "outputs", "left", "sent")}
    found |= {"passes": len(passes), "tied": head is embedding}
    found["buckets"] = [getattr(trainer.strategy, "_ddp_kwargs", {}).get("gradient_as_bucket_view")]
    return found | {"weights": whole_tensors(module.named_parameters())}


def trained_each_way(folder: Path) -> list[dict[str, Any]]:
    return [trained(folder, *way) for way in WAYS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model("llama-tied", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return trained(folder, "one")


@pytest.fixture(scope="module")
def by_way(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    first, second = on_two_ranks(trained_each_way, tmp_path_factory.mktemp("ranks"), folder, seconds=300)
    return {way: [first[number], second[number]] for number, way in enumerate(WAYS)}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one_process(
    alone: dict[str, Any], by_way: dict[tuple[str, str], list[dict[str, Any]]], way: tuple[str, str]
) -> None:
    for rank in by_way[way]:
        assert rank["tied"] and len(rank["gradients"]) == len(alone["gradients"]) == 3
        for found, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            assert max(float(gradient.norm()) for gradient in expected.values()) > 0.5
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(rank["weights"], alone["weights"], atol=2e-6, rtol=0)
        assert [each["stepped"] for each in rank["outputs"]] == [True, True, True, False]
    for step in range(3):
        for name in ("mean_loss", "value_loss"):
            shares = [rank["outputs"][step][name] for rank in by_way[way]]
            assert sum(shares) / 2 == pytest.approx(alone["outputs"][step][name], abs=1e-5), (step, name)
        for rank in by_way[way]:
            assert rank["outputs"][step]["grad_norm"] == pytest.approx(alone["outputs"][step]["grad_norm"], rel=1e-5)


def test_gradients_are_sent_once_a_step(by_way: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    units = 3 + 4  # two layers and the rest of the policy; those of the critic's base, and its head
    passes: dict[tuple[str, str], list[int]] = {way: [rank["passes"] for rank in by_way[way]] for way in WAYS}
    for rank in by_way["ddp", "step"]:
        every = sum(weight.numel() for weight in rank["weights"].values())
        assert [_numbers(step, "allreduce_") for step in rank["sent"]] == [[every]] * 4
    assert passes["ddp", "step"][0] != passes["ddp", "step"][1], "no rank makes passes for another's sake"
    for rank in by_way["fsdp2", "step"]:
        # If no rank has rows, a step makes no pass.
        assert [len(_numbers(step, "_reduce_scatter_base_")) for step in rank["sent"]] == [units, units, units, 0]
    for rank in by_way["fsdp2", "micro_batch"]:
        sent = [len(_numbers(step, "_reduce_scatter_base_")) for step in rank["sent"]]
        assert sum(sent) == units * rank["passes"] > 2 * units * 3
    assert passes["fsdp2", "step"] == passes["fsdp2", "micro_batch"]
    assert passes["fsdp2", "step"][0] == passes["fsdp2", "step"][1]


def _numbers(step: list[tuple[str, int]], kind: str) -> list[int]:
    """Returns the sizes of the collectives of a kind, without those of single numbers."""
    return [numbers for name, numbers in step if name == kind and numbers > 1]


@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_outlives_the_step(
    alone: dict[str, Any], by_way: dict[tuple[str, str], list[dict[str, Any]]], way: tuple[str, str]
) -> None:
    kept = way[0] == "ddp"  # cleared in its buckets
    for rank in by_way[way]:
        assert rank["left"] == ["cleared" if kept else "none"] * 4
    assert alone["left"] == ["none"] * 4
    assert by_way["ddp", "step"][0]["buckets"] == [True]


def test_moments_of_exchange_are_named() -> None:
    with pytest.raises(SettingError, match=r"model\.gradient_sync is 'never'; it must be step or micro_batch"):
        PolicyModule(path="unused", gradient_sync="never")
