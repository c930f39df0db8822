"""Refuses settings that name a reward part which the task does not give."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Verify
from popo_lightning.grading.pool import GradingPool
from popo_lightning.tasks.reward_settings import answer_text

ALWAYS = {"score", "acc"}  # parts of every grade

NamedPart = tuple[str, str]
"""(setting, reward part)"""


def named_parts(reward_key: str, effective_key: str, **rules: Any) -> list[NamedPart]:
    """The settings that name a reward part.

    Args:
        reward_key: Part that is trained on.
        effective_key: Part that decides "effective".
        rules: The run's composer and sampler, or None, by setting.
    """
    named = [("model.reward_key", reward_key), ("data.effective_key", effective_key)]
    for place, rule in rules.items():
        settings = {} if rule is None else vars(rule)
        named += [(f"data.{place}.{key}", value) for key, value in settings.items() if key.endswith("_key")]
    return named


def check_parts(named: Sequence[NamedPart], given: Collection[str]) -> None:
    """Raises SettingError for a setting whose reward part is not given.

    Args:
        named: Settings and their parts.
        given: Parts that graded responses have.
    """
    for setting, part in named:
        if part not in given:
            others = ", ".join(sorted(given))
            hint = did_you_mean(part, given, f"use one of {others}")
            raise SettingError(f"{setting} is '{part}', which the task does not give; {hint}")


def try_parts(data: Any, named: Sequence[NamedPart]) -> None:
    """Checks reward parts on two answers to the first problem, before anything is sampled.

    Nothing is tried where every grade has the parts, and nothing is refused if neither answer can be graded.

    Args:
        data: The data module.
        named: Settings and their parts.

    Raises:
        SettingError: The task does not give a part.
    """
    if not len(data.limits) and {part for _, part in named} <= ALWAYS:
        return
    if given := _tried(data.task.verify, data.problems.train[0], data.grading_timeout):
        given |= set() if data.overlong is None else {"overlong"}
        check_parts(named, given)
        data.limits.check_parts(given)


def _tried(verify: Verify, problem: Problem, seconds: float) -> set[str]:
    """Returns the reward parts of the gold answer and of an empty one together."""
    texts = (answer_text(problem.answer), "")
    with GradingPool(verify, 1, seconds) as pool:
        grades = pool.grade([(problem.answer, problem.response_prefix + text) for text in texts])
    return {part for grade in grades if grade.failure is None for part in grade.parts}
