"""Refuses settings that make no sense together, each in one sentence, before a model loads.

A class refuses in its own constructor what it can check alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import lightning as L

from popo_lightning.core.errors import SettingError
from popo_lightning.data import RolloutDataModule
from popo_lightning.model.critic import Critic
from popo_lightning.model.critic_heads import CategoricalHead
from popo_lightning.objectives.weights import NoCorrection
from popo_lightning.policy import PolicyModule
from popo_lightning.proximal.snapshot import ProximalPolicy


def check_combination(policy: PolicyModule, data: RolloutDataModule, callbacks: Iterable[L.Callback]) -> None:
    """Raises SettingError for the first combination that makes no sense.

    Args:
        policy: Policy with objective, advantage and critic.
        data: Data module with composer, sampler and sampling settings.
        callbacks: Callbacks of the trainer, with proximal policy and parameter hook.
    """
    for sentence in _objections(policy, data, list(callbacks)):
        raise SettingError(sentence)


def _objections(policy: PolicyModule, data: RolloutDataModule, callbacks: list[L.Callback]) -> Iterator[str]:
    weight, region = policy.objective.behave_weight, policy.objective.trust_region
    for callback in callbacks:
        if _moves_prox(callback) and not weight.correct_fresh and not region.compares_pairs:
            yield (
                f"proximal is {type(callback).__name__}, whose prox did not sample the fresh rows, but "
                f"model.behave_weight is {type(weight).__name__} without correct_fresh, which takes that for "
                "granted; use TruncatedIS with correct_fresh true"
            )
    if data.sampling.temperature_spread:
        yield from _objections_to_spread(policy, data, callbacks)
    if data.behave == "trainer":
        yield from _objections_to_trainer(policy, callbacks)
    if data.async_level:
        yield from _objections_to_lag(data)
    if isinstance(weight, NoCorrection) and not region.includes_is_weight:
        yield from _objections_to_no_correction(policy, data)
    if (sentence := policy.advantage.objection(data.group_size)) is not None:
        yield sentence
    yield from _objections_to_reward_keys(policy, data)
    if data.composer.makes_pairs or region.compares_pairs:
        yield from _objections_to_pairs(policy, data)
    if any(getattr(callback, "estimate_buffer", False) for callback in callbacks):
        yield from _objections_to_buffer_estimate(data)
    if data.limits:
        yield from _objections_to_limits(policy, data)
    if policy.critic is not None:
        yield from _objections_to_critic(policy.critic, policy.reward_key, data)
    elif share := data.composer.fresh_continuations:
        yield (
            f"data.composer.fresh_continuations is {share}, but model.critic is null, which alone learns from them; "
            "set a critic, as in method/popo_ppo, or fresh_continuations to 0"
        )


def _objections_to_no_correction(policy: PolicyModule, data: RolloutDataModule) -> Iterator[str]:
    """Objections to model.behave_weight NoCorrection where another policy than the present one has sampled."""
    weighted = policy.advantage.includes_is_weight and not data.composer.fixes_advantages
    for name, value, _ in () if weighted else _delays(data):
        yield (
            f"data.{name} is {value}, so responses come from older weights, but model.behave_weight is NoCorrection, "
            "which corrects nothing; use TruncatedIS, or a trust region around behave"
        )
    if data.composer.trains_on_others and not weighted:
        yield (
            f"data.composer is {type(data.composer).__name__}, which trains on what other models sampled, but "
            "model.behave_weight is NoCorrection, which takes that for prox's; use TruncatedIS, or the trust region "
            "BehaveAligned"
        )


def _delays(data: RolloutDataModule) -> Iterator[tuple[str, int, int]]:
    """Settings with which older weights sample: the name, its value, and the value without a delay."""
    for name, off in (("weight_sync_interval", 1), ("async_level", 0)):
        if (value := getattr(data, name)) != off:
            yield name, value, off


def _objections_to_reward_keys(policy: PolicyModule, data: RolloutDataModule) -> Iterator[str]:
    """Of rules that read another reward component than the one that is trained on."""
    if data.composer.follows_reward and (key := getattr(data.composer, "reward_key", None)) != policy.reward_key:
        yield (
            f"data.composer.reward_key is '{key}', but model.reward_key, which is trained on, is "
            f"'{policy.reward_key}'; set both to the same component"
        )
    decides = data.effective_key or policy.reward_key
    if data.sampler.follows_reward and (key := getattr(data.sampler, "reward_key", None)) != decides:
        yield (
            f"data.sampler.reward_key is '{key}', but groups are effective by '{decides}' (data.effective_key, or else "
            "model.reward_key); set both to the same component"
        )
    if data.overlong is not None and policy.reward_key not in ("score", "overlong"):
        yield (
            f"data.overlong is set, but its penalty is part of the score, and model.reward_key is "
            f"'{policy.reward_key}'; train on score, or leave the penalty out"
        )


def _moves_prox(callback: L.Callback) -> bool:
    """Whether a callback makes prox another policy than the one that sampled the fresh rows."""
    return isinstance(callback, ProximalPolicy) and callback.prox_differs_on_fresh


def _objections_to_spread(policy: PolicyModule, data: RolloutDataModule, callbacks: list[L.Callback]) -> Iterator[str]:
    """Objections to data.temperature_spread, under which behave differs from prox on fresh rows as well."""
    weight = policy.objective.behave_weight
    spread = f"data.temperature_spread is {data.sampling.temperature_spread}, so fresh rows are sampled at temperatures"
    if not weight.correct_fresh and not policy.objective.trust_region.compares_pairs:  # a pair loss has no such weight
        yield (
            f"{spread} other than prox's, but model.behave_weight is {type(weight).__name__} without correct_fresh, "
            "which takes them for prox's; use TruncatedIS with correct_fresh true, or a spread of 0"
        )
    for callback in callbacks:
        if isinstance(callback, ProximalPolicy) and callback.prox_is_behave_on_fresh:
            yield (
                f"{spread} of their own, but proximal is {type(callback).__name__}, which takes the engine's log-probs "
                "of them for prox's; use ProximalSnapshot with recompute_fresh true, or a spread of 0"
            )


def _objections_to_trainer(policy: PolicyModule, callbacks: list[L.Callback]) -> Iterator[str]:
    """Objections to data.behave trainer, under which the engine's log-probs are unknown."""
    weight = policy.objective.behave_weight
    if weight.correct_fresh and not any(map(_moves_prox, callbacks)):
        yield (
            "data.behave is trainer, so that prox and behave of fresh rows are the same, but model.behave_weight is "
            f"{type(weight).__name__} with correct_fresh true, which is to correct what engine and trainer differ by; "
            "set correct_fresh to false, or data.behave to engine"
        )


def _objections_to_pairs(policy: PolicyModule, data: RolloutDataModule) -> Iterator[str]:
    """Objections to preference pairs that only one of composer and trust region supports."""
    composer, region = type(data.composer).__name__, type(policy.objective.trust_region).__name__
    if not policy.objective.trust_region.compares_pairs:
        yield (
            f"data.composer is {composer}, which makes pairs of responses, but model.trust_region is {region}, which "
            "does not compare them; use PairLoss, as method/online_dpo does"
        )
    if not data.composer.makes_pairs:
        yield (
            f"model.trust_region is {region}, which compares pairs, but data.composer is {composer}, which makes none; "
            "use Pairs, as method/online_dpo does"
        )
    if (made := getattr(data.composer, "bootstrap", 0.0)) and (
        opa := getattr(policy.objective.trust_region, "opa", 0.0)
    ):
        yield (
            f"data.composer.bootstrap is {made:g}, which makes pairs without a verifier, but model.trust_region.opa is "
            f"{opa:g}, which would imitate their winners; set opa to 0"
        )


def _objections_to_buffer_estimate(data: RolloutDataModule) -> Iterator[str]:
    """Objections to an estimate from the buffer, which takes groups of earlier versions for replayed ones."""
    composer = type(data.composer).__name__
    for name, value, off in _delays(data):
        yield (
            f"monitor.estimate_buffer is true, but data.{name} is {value}, with which fresh groups are of earlier "
            f"versions as well; set it to false, or data.{name} to {off}"
        )
    if data.composer.makes_pairs:
        yield (
            f"monitor.estimate_buffer is true, but data.composer is {composer}, of whose pairs one response is right "
            "whatever the policy is; set it to false"
        )
    if data.composer.trains_on_others:
        yield (
            f"monitor.estimate_buffer is true, but data.composer is {composer}, which also trains on what other models "
            "sampled; set it to false"
        )


def _objections_to_limits(policy: PolicyModule, data: RolloutDataModule) -> Iterator[str]:
    """Objections to data.limits, which subtract the cost of responses from advantages."""
    names = ", ".join(data.limits.multipliers)
    if data.composer.fixes_advantages:
        yield (
            f"data.composer is {type(data.composer).__name__}, which fixes the advantages of what it replays, but "
            f"data.limits ({names}) charge them at the present multipliers; leave one of the two out"
        )
    if policy.advantage.includes_is_weight:
        yield (
            f"model.advantage is {type(policy.advantage).__name__} with off_policy, whose advantages hold pi_prox / "
            f"pi_behave already, which the charges of data.limits ({names}) do not; set off_policy to false, or leave "
            "one of the two out"
        )
    if data.limits.need_reference and data.sampling.temperature_spread:
        yield (
            f"data.temperature_spread is {data.sampling.temperature_spread}, but data.limits ({names}) bound the cost "
            "kl, which would count the temperature that a response was sampled at; leave one of the two out"
        )
    for name, each in data.limits.multipliers.items():
        if each.limit.cost == policy.reward_key:
            yield (
                f"the cost of data.limits.{name} is '{policy.reward_key}', the component that is trained on "
                "(model.reward_key); name one that is to stay small"
            )


def _objections_to_critic(critic: Critic, reward_key: str, data: RolloutDataModule) -> Iterator[str]:
    """Objections to model.critic with these data settings."""
    if data.composer.fixes_advantages:
        yield (
            f"data.composer is {type(data.composer).__name__}, which fixes the advantages of what it replays, but "
            "model.critic learns from advantages of its own; leave one of them out"
        )
    target, steps = critic.target, data.minibatches * data.ppo_epochs
    if target is not None and not target.small_steps and not target.anchor and steps % target.every == 0:
        yield (
            f"model.critic.target has polyak 1, momentum 0, anchor 0 and every {target.every}, but an iteration has "
            f"{steps} optimizer steps (data.minibatches * data.ppo_epochs), so that its copy is the critic whenever "
            "values are read; set polyak below 1, such as 0.05, or an every that does not divide the steps"
        )
    head = critic.head
    least = 0.0 if data.overlong is None or reward_key not in ("score", "overlong") else -data.overlong.most
    if isinstance(head, CategoricalHead) and least < 0 and head.low > least:
        yield (
            f"model.critic.head is CategoricalHead with low {head.low:g}, but the penalty of data.overlong takes "
            f"'{reward_key}' down to {least:g}; set low to that or below"
        )


def _objections_to_lag(data: RolloutDataModule) -> Iterator[str]:
    """Objections to data.async_level 1, under which an iteration's newest responses are one version old."""
    lag = f"data.async_level is {data.async_level}"
    if data.weight_sync_interval > 1:
        yield f"{lag} and data.weight_sync_interval {data.weight_sync_interval}; choose one of the two delays"
    for name, slot in (("composer", data.composer), ("sampler", data.sampler)):
        if not slot.supports_async:
            yield (
                f"{lag}, but data.{name} is {type(slot).__name__}, which counts on responses of the present version; "
                "set data.async_level to 0"
            )
    for name, holder in (("buffer.max_age", getattr(data.composer, "buffer", None)), ("max_age", data.composer)):
        oldest = getattr(holder, "max_age", None)
        if oldest is not None and oldest <= data.async_level:
            yield (
                f"data.composer.{name} is {oldest}, but with data.async_level {data.async_level} no stored group is "
                "younger than 2 versions when it is replayed; use at least 2"
            )
