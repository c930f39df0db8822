"""Refuses settings of the rollouts that would silently give wrong results."""

from __future__ import annotations

import logging

from popo_lightning.core.bounds import above, one_of, within
from popo_lightning.core.errors import SettingError
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.rollout.engine_rollouts import EngineRollouts
from popo_lightning.rollout.reward_components import named_components, try_components

COLDEST, HOTTEST = 1e-3, 1e3  # temperatures outside destroy the information of float32 logits
MIN = {
    "problems_per_iteration": (1, "ask at least one problem"),
    "group_size": (2, "a group needs two responses to differ"),
    "minibatches": (1, "an iteration needs one optimizer step"),
    "ppo_epochs": (1, "the minibatches are trained on once at least"),
    "weight_sync_interval": (1, "1 samples with the newest weights always"),
    "max_new_tokens": (1, "a response needs one token"),
    "max_prompt_tokens": (1, "a prompt has one token"),
    "num_graders": (1, "at least one grading process is needed"),
}

log = logging.getLogger(__name__)


def check_settings(data: EngineRollouts) -> None:
    """Raises SettingError for faults that can be seen before anything is loaded."""
    for name, (least, reason) in MIN.items():
        value = data.sampling.max_new_tokens if name == "max_new_tokens" else getattr(data, name)
        if value < least:
            raise SettingError(f"data.{name} is {value}; use at least {least}: {reason}")
    above("data.grading_timeout", data.grading_timeout, 0, "5.0 seconds")
    if data.minibatches > data.problems_per_iteration:
        raise SettingError(
            f"data.minibatches is {data.minibatches} but an iteration has only {data.problems_per_iteration} groups "
            "(data.problems_per_iteration); lower the first or raise the second"
        )
    within("data.temperature", data.sampling.temperature, COLDEST, HOTTEST, "1.0")
    _check_spread(data)
    _check_behave(data)
    if "" in data.sampling.stop:
        raise SettingError(
            f"data.stop is {list(data.sampling.stop)}, and every text has the empty one; give strings of a "
            "character or more, or [] for none"
        )
    if data.async_level not in (0, 1):
        raise SettingError(f"data.async_level is {data.async_level}; use 0, or 1 to generate one iteration ahead")
    if data.async_level and not data.engine.generates_while_training:
        raise SettingError(
            f"data.async_level is {data.async_level}, but data.engine is {type(data.engine).__name__}, which cannot "
            "generate while the trainer works; set data.async_level to 0, or data.engine to "
            "popo_lightning.engines.servers.engine.ServerEngine"
        )
    pixels = data.image_pixels
    if pixels is not None and not 0 < pixels[0] <= pixels[1]:
        raise SettingError(
            f"data.image_pixels is {list(pixels)}; give the least and the most pixels of an image, such as "
            "[3136, 401408]"
        )
    if data.overlong is not None:
        data.overlong.check(data.sampling.max_new_tokens)


def _check_spread(data: EngineRollouts) -> None:
    temperature, spread = data.sampling.temperature, data.sampling.temperature_spread
    if not 0 <= spread <= temperature - COLDEST or temperature + spread > HOTTEST:
        raise SettingError(
            f"data.temperature_spread is {spread}; use 0 for none, or a number below data.temperature ({temperature}), "
            "such as 0.2, so that every response has a positive temperature"
        )
    if spread and not data.engine.spreads_temperature:
        raise SettingError(
            f"data.temperature_spread is {spread}, but data.engine is {type(data.engine).__name__}, which samples all "
            "responses at one temperature; use 0, or an engine with spreads_temperature"
        )


def _check_behave(data: EngineRollouts) -> None:
    """Checks data.behave. The trainer's log-probs are behave's only if its weights sampled, at data.temperature."""
    one_of("data.behave", data.behave, ("engine", "trainer"))
    if data.behave == "engine":
        return
    for name, value, off, reason in (
        ("async_level", data.async_level, 0, "whose responses older weights sample"),
        ("weight_sync_interval", data.weight_sync_interval, 1, "whose responses older weights sample"),
        ("temperature_spread", data.sampling.temperature_spread, 0, "whose responses have temperatures of their own"),
    ):
        if value != off:
            raise SettingError(
                f"data.behave is trainer, the policy's own log-probs at data.temperature, but data.{name} is {value}, "
                f"{reason}; set data.{name} to {off}, or data.behave to engine"
            )


def check_training(data: EngineRollouts, module: PolicyModel, ranks: int) -> None:
    """Raises SettingError for faults that show once policy and problems are known, before anything is sampled."""
    check_share(data, ranks)
    check_continuations(data, module.sharded)
    if data.sampling.temperature != module.temperature:
        raise SettingError(
            f"data.temperature is {data.sampling.temperature}, but model.temperature, at which log-probs are computed, "
            f"is {module.temperature}; give both the same"
        )
    data.components |= try_components(data, named_components(data, module.reward_key))


def check_share(data: EngineRollouts, ranks: int) -> None:
    """Raises SettingError if ranks would sample different numbers of problems."""
    if data.problems_per_iteration % ranks:
        raise SettingError(
            f"data.problems_per_iteration is {data.problems_per_iteration}, which {ranks} ranks cannot share evenly; "
            f"use a multiple of {ranks}"
        )


def check_continuations(data: EngineRollouts, split: bool) -> None:
    """Raises SettingError if an older policy would write the continuations, or if sharded ranks would fall out of step.

    The number of a critic's extra passes differs by rank, which sharded weights do not allow.

    Args:
        data: The data module.
        split: Whether weights are sharded over the ranks.
    """
    share = data.composer.fresh_continuations
    if share and data.weight_sync_interval > 1:
        raise SettingError(
            f"data.composer.fresh_continuations is {share}, which the present policy is to write, but "
            f"data.weight_sync_interval is {data.weight_sync_interval}; set that to 1, or fresh_continuations to 0"
        )
    if share and split:
        raise SettingError(
            f"data.composer.fresh_continuations is {share}, but trainer.strategy ModelParallelStrategy splits the "
            "critic, whose passes the ranks must make together; use trainer.strategy ddp, or fresh_continuations 0"
        )


def warn_of_problems_that_never_return(data: EngineRollouts, iterations: int, ranks: int) -> None:
    """Warns if a composer replays only when a problem returns, and the run asks too few problems for that.

    Each rank keeps only its own samples. With R ranks, a problem returns to the same rank once in R passes.
    """
    passes = data.composer.passes_before_replay(data.group_size)
    asked, problems = iterations * data.problems_per_iteration, len(data.problems.train)
    if passes and 0 < asked < (1 + passes) * ranks * problems:
        log.warning(
            "%s replays what it has of a problem once that has come back (%d times), but the run asks %d problems and "
            "a pass over all takes %d: few or none come back so often",
            type(data.composer).__name__,
            passes * ranks,
            asked,
            problems,
        )
