"""Refuses settings of the rollouts that would silently give wrong results."""

from __future__ import annotations

import logging
import math
from typing import Any

from popo_lightning.core.errors import SettingError

COLDEST, HOTTEST = 1e-3, 1e3  # temperatures beyond leave nothing of float32 logits
LEAST = {
    "problems_per_iteration": (1, "ask at least one problem"),
    "group_size": (2, "a group needs two responses to differ"),
    "minibatches": (1, "an iteration needs one optimizer step"),
    "ppo_epochs": (1, "the minibatches are trained on once at least"),
    "weight_sync_interval": (1, "1 samples with the newest weights always"),
    "num_graders": (1, "someone has to grade"),
}

log = logging.getLogger(__name__)


def check_settings(data: Any) -> None:
    """Raises SettingError for what can be seen before anything is loaded."""
    for name, (least, reason) in LEAST.items():
        _at_least(name, getattr(data, name), least, reason)
    _at_least("max_new_tokens", data.sampling.max_new_tokens, 1, "a response needs one token")
    _at_least("max_prompt_tokens", data.max_prompt_tokens, 1, "a prompt has one token")
    if not 0 < data.grading_timeout < math.inf:
        raise SettingError(
            f"data.grading_timeout is {data.grading_timeout}; use a number of seconds above 0, such as 5.0"
        )
    if data.minibatches > data.problems_per_iteration:
        raise SettingError(
            f"data.minibatches is {data.minibatches} but an iteration has only {data.problems_per_iteration} groups "
            "(data.problems_per_iteration); lower the first or raise the second"
        )
    if not COLDEST <= data.sampling.temperature <= HOTTEST:
        raise SettingError(
            f"data.temperature is {data.sampling.temperature}; training samples at a positive temperature, "
            f"{COLDEST:g} to {HOTTEST:g}, such as 1.0"
        )
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
            "generate while the "
            "trainer works; set data.async_level to 0, or data.engine to "
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


def _at_least(name: str, value: int, least: int, reason: str) -> None:
    if value < least:
        raise SettingError(f"data.{name} is {value}; use at least {least}: {reason}")


def check_temperature(sampled: float, scored: float) -> None:
    """Raises SettingError where log-probs would not be those of the distribution that is sampled from.

    Args:
        sampled: Of the data module.
        scored: Of the policy.
    """
    if sampled != scored:
        raise SettingError(
            f"data.temperature is {sampled}, but model.temperature, at which log-probs are computed, is {scored}; give "
            "both the same"
        )


def check_share(data: Any, ranks: int) -> None:
    """Raises SettingError where ranks would sample different numbers of problems."""
    if data.problems_per_iteration % ranks:
        raise SettingError(
            f"data.problems_per_iteration is {data.problems_per_iteration}, which {ranks} ranks cannot share evenly; "
            f"use a multiple of {ranks}"
        )


def warn_of_problems_that_never_return(data: Any, iterations: int, ranks: int) -> None:
    """For composers that replay when a problem comes back.

    Each rank keeps what it sampled, and a problem comes back to it in one of so many passes as there are ranks.
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
