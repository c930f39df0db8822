"""Refuses settings that name a reward component which the task does not give."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.ranks import all_gather_object
from popo_lightning.core.task import Verify
from popo_lightning.grading.pool import GradingPool
from popo_lightning.rollout.engine_rollouts import EngineRollouts
from popo_lightning.tasks.reward_settings import answer_text

ALWAYS = {"score", "acc"}  # components of every grade

NamedComponent = tuple[str, str]
"""(setting, reward component)"""


def named_components(data: EngineRollouts, reward_key: str) -> list[NamedComponent]:
    """The settings that name a reward component, of which `reward_key` is the one that is trained on."""
    named = [("model.reward_key", reward_key), ("data.effective_key", data.effective_key or reward_key)]
    for slot, rule in (("composer", data.composer), ("sampler", data.sampler)):
        named += [(f"data.{slot}.{key}", value) for key, value in vars(rule).items() if key.endswith("_key")]
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


def try_components(data: EngineRollouts, named: Sequence[NamedComponent]) -> set[str]:
    """Checks reward components on two answers to the first problem, before anything is sampled. May be a collective.

    Nothing is tried where every grade has the components, and nothing is refused where the two answers do not tell all.

    Args:
        data: The data module.
        named: Settings and their components.

    Returns:
        The components that the answers have; none if nothing was tried, or if they do not tell all.

    Raises:
        SettingError: The task does not give a component.
    """
    if not data.limits.bound_components and {component for _, component in named} <= ALWAYS:
        return set()
    tried = all_gather_object(_tried(data.task.verify, data.problems.train[0], data.grading_timeout))
    given = {name for of_rank in tried for name in of_rank}  # a rank may be too slow, and all must decide alike
    if given:
        given |= set() if data.overlong is None else {"overlong"}
        check_components(named, given)
        data.limits.check_components(given)
    return given


def _tried(verify: Verify, problem: Problem, seconds: float) -> set[str]:
    """Returns the components of the gold answer and of an empty one together; none if the two do not tell all.

    They do not if one of them has no grade. With a verifier of a user's own they do not either if the gold answer is no
    better than the empty one, because right answers may have further components.
    """
    texts = (answer_text(problem.answer), "")
    with GradingPool(verify, 1, seconds) as pool:
        grades = pool.grade([(problem.answer, problem.response_prefix + text) for text in texts])
    if any(grade.failure is not None for grade in grades):
        return set()
    gold, empty = (grade.parts for grade in grades)
    if not _grades_all_alike(verify) and gold["score"] <= empty["score"]:
        return set()
    return {name for grade in grades for name in grade.parts}


def _grades_all_alike(verify: Verify) -> bool:
    """Whether every answer gets the same components: those of this package do, except functions of a user's own."""
    module = str(getattr(verify, "__module__", ""))
    return module.startswith("popo_lightning.") and not module.endswith(".function_reward")
