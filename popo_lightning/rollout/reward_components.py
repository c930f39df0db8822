"""Refuses settings that name a reward component which the task does not give."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import SettingError
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Verify
from popo_lightning.grading.pool import GradingPool
from popo_lightning.rollout.engine_rollouts import EngineRollouts
from popo_lightning.tasks.reward_settings import answer_text

ALWAYS = {"score", "acc"}  # components of every grade

NamedComponent = tuple[str, str]
"""(setting, reward component)"""


def named_components(reward_key: str, effective_key: str, **rules: KeepsState | None) -> list[NamedComponent]:
    """The settings that name a reward component.

    Args:
        reward_key: Component that is trained on.
        effective_key: Component that decides "effective".
        rules: The run's composer and sampler, or None, by setting.
    """
    named = [("model.reward_key", reward_key), ("data.effective_key", effective_key)]
    for slot, rule in rules.items():
        settings = {} if rule is None else vars(rule)
        named += [(f"data.{slot}.{key}", value) for key, value in settings.items() if key.endswith("_key")]
    return named


def check_components(named: Sequence[NamedComponent], given: Collection[str]) -> None:
    """Raises SettingError for a setting whose reward component is not given.

    Args:
        named: Settings and their components.
        given: Components that graded responses have.
    """
    for setting, component in named:
        if component not in given:
            others = ", ".join(sorted(given))
            hint = did_you_mean(component, given, f"use one of {others}")
            raise SettingError(f"{setting} is '{component}', which the task does not give; {hint}")


def try_components(data: EngineRollouts, named: Sequence[NamedComponent]) -> None:
    """Checks reward components on two answers to the first problem, before anything is sampled.

    Nothing is tried where every grade has the components, and nothing is refused if neither answer can be graded.

    Args:
        data: The data module.
        named: Settings and their components.

    Raises:
        SettingError: The task does not give a component.
    """
    if not len(data.limits) and {component for _, component in named} <= ALWAYS:
        return
    if given := _tried(data.task.verify, data.problems.train[0], data.grading_timeout):
        given |= set() if data.overlong is None else {"overlong"}
        check_components(named, given)
        data.limits.check_components(given)


def _tried(verify: Verify, problem: Problem, seconds: float) -> set[str]:
    """Returns the reward components of the gold answer and of an empty one together."""
    texts = (answer_text(problem.answer), "")
    with GradingPool(verify, 1, seconds) as pool:
        grades = pool.grade([(problem.answer, problem.response_prefix + text) for text in texts])
    return {name for grade in grades if grade.failure is None for name in grade.parts}
