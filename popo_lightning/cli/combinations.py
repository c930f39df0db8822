"""Choices that are each allowed and make no sense together. Each is refused in one sentence before a model loads.

What a single class can see of itself it refuses in its own constructor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.data import RolloutDataModule
from popo_lightning.objectives.weights import One, ReplayedWeight
from popo_lightning.policy import PolicyModule
from popo_lightning.proximal.snapshot import ProximalPolicy


def check_combination(policy: PolicyModule, data: RolloutDataModule, callbacks: Iterable[Any]) -> None:
    """Raises SettingError for the first combination that makes no sense.

    Args:
        policy: Objective, advantage and critic.
        data: Composer, sampler and how data are sampled.
        callbacks: The trainer's, proximal policy and parameter hook among them.
    """
    for sentence in _objections(policy, data, list(callbacks)):
        raise SettingError(sentence)


def _objections(policy: PolicyModule, data: RolloutDataModule, callbacks: list[Any]) -> Iterator[str]:
    objective = policy.objective
    weight = objective.behave_weight
    for callback in callbacks:
        moved = isinstance(callback, ProximalPolicy) and callback.moves_fresh_rows
        if moved and not (isinstance(weight, ReplayedWeight) and weight.correct_fresh):
            yield (
                f"proximal is {type(callback).__name__}, whose prox did not sample the fresh rows, but "
                f"model.behave_weight is {type(weight).__name__} without correct_fresh, which takes that for "
                "granted; use Decoupled with correct_fresh true"
            )
    if data.sync_every > 1 and isinstance(weight, One) and not objective.trust_region.folds_weight:
        yield (
            f"data.sync_every is {data.sync_every}, so responses come from older weights, but "
            "model.behave_weight is One, which corrects nothing; use Decoupled, or a trust region around "
            "behave"
        )
    if data.lag:
        yield from _objections_to_lag(policy, data)
    if (sentence := policy.advantage.objection(data.group_size)) is not None:
        yield sentence
    by = getattr(data.composer, "reward", policy.reward)
    if by != policy.reward:
        yield (
            f"data.composer.reward is '{by}', but model.reward, which is trained on, is '{policy.reward}'; set both to "
            "the same part"
        )
    if policy.critic is not None and data.composer.fixes_advantages:
        yield (
            f"data.composer is {type(data.composer).__name__}, which fixes the advantages of what it replays, but "
            "model.critic learns from advantages of its own; leave one of them out"
        )


def _objections_to_lag(policy: PolicyModule, data: RolloutDataModule) -> Iterator[str]:
    """Of data.lag 1, under which an iteration's newest responses are one version old."""
    weight, region = policy.objective.behave_weight, policy.objective.trust_region
    if data.sync_every > 1:
        yield f"data.lag is {data.lag} and data.sync_every {data.sync_every}; choose one of the two delays"
    for name, slot in (("composer", data.composer), ("sampler", data.sampler)):
        if not slot.works_ahead:
            yield (
                f"data.lag is {data.lag}, but data.{name} is {type(slot).__name__}, which counts on responses of the "
                "present version; set data.lag to 0"
            )
    if isinstance(weight, One) and not (region.folds_weight or policy.advantage.folds_weight):
        yield (
            f"data.lag is {data.lag}, so responses come from older weights, but model.behave_weight is One, "
            "which corrects nothing; use Decoupled, or a trust region around behave"
        )
    for name, holder in (("buffer.max_age", getattr(data.composer, "buffer", None)), ("max_age", data.composer)):
        oldest = getattr(holder, "max_age", None)
        if oldest is not None and oldest <= data.lag:
            yield (
                f"data.composer.{name} is {oldest}, but with data.lag {data.lag} no stored group is younger than 2 "
                "versions when it is replayed; use at least 2"
            )
