"""Settings that are each allowed but make no sense together. Each is refused in one sentence before a model loads.

A class refuses in its own constructor what it can see by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.data import RolloutDataModule
from popo_lightning.objectives.weights import NoCorrection, ReplayedWeight
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
        moved = isinstance(callback, ProximalPolicy) and callback.prox_differs_on_fresh
        if moved and not (isinstance(weight, ReplayedWeight) and weight.correct_fresh):
            yield (
                f"proximal is {type(callback).__name__}, whose prox did not sample the fresh rows, but "
                f"model.behave_weight is {type(weight).__name__} without correct_fresh, which takes that for "
                "granted; use TruncatedIS with correct_fresh true"
            )
    if (
        data.weight_sync_interval > 1
        and isinstance(weight, NoCorrection)
        and not objective.trust_region.includes_is_weight
    ):
        yield (
            f"data.weight_sync_interval is {data.weight_sync_interval}, so responses come from older weights, but "
            "model.behave_weight is NoCorrection, which corrects nothing; use TruncatedIS, or a trust region around "
            "behave"
        )
    if data.async_level:
        yield from _objections_to_lag(policy, data)
    if (sentence := policy.advantage.objection(data.group_size)) is not None:
        yield sentence
    if data.composer.follows_reward and (key := getattr(data.composer, "reward_key", None)) != policy.reward_key:
        yield (
            f"data.composer.reward_key is '{key}', but model.reward_key, which is trained on, is "
            f"'{policy.reward_key}'; set both to the same part"
        )
    if policy.critic is not None and data.composer.fixes_advantages:
        yield (
            f"data.composer is {type(data.composer).__name__}, which fixes the advantages of what it replays, but "
            "model.critic learns from advantages of its own; leave one of them out"
        )


def _objections_to_lag(policy: PolicyModule, data: RolloutDataModule) -> Iterator[str]:
    """Of data.async_level 1, under which an iteration's newest responses are one version old."""
    weight, region = policy.objective.behave_weight, policy.objective.trust_region
    if data.weight_sync_interval > 1:
        yield (
            f"data.async_level is {data.async_level} and data.weight_sync_interval {data.weight_sync_interval}; choose "
            "one of the two delays"
        )
    for name, slot in (("composer", data.composer), ("sampler", data.sampler)):
        if not slot.supports_async:
            yield (
                f"data.async_level is {data.async_level}, but data.{name} is {type(slot).__name__}, which counts on "
                "responses of the "
                "present version; set data.async_level to 0"
            )
    if isinstance(weight, NoCorrection) and not (region.includes_is_weight or policy.advantage.includes_is_weight):
        yield (
            f"data.async_level is {data.async_level}, so responses come from older weights, but model.behave_weight "
            "is NoCorrection, "
            "which corrects nothing; use TruncatedIS, or a trust region around behave"
        )
    for name, holder in (("buffer.max_age", getattr(data.composer, "buffer", None)), ("max_age", data.composer)):
        oldest = getattr(holder, "max_age", None)
        if oldest is not None and oldest <= data.async_level:
            yield (
                f"data.composer.{name} is {oldest}, but with data.async_level {data.async_level} no stored group is "
                "younger than 2 "
                "versions when it is replayed; use at least 2"
            )
