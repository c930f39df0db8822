"""The verifier as a setting: a class, or the addresses of functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Required, TypedDict

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.problems import Problem
from popo_lightning.grading.pool import GradingPool
from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.function_reward import FunctionReward

SECONDS = 10.0  # time limit for one response of the trial

if TYPE_CHECKING:
    FunctionAddress = str
else:
    import yaml
    from jsonargparse.typing import restricted_string_type

    FunctionAddress = restricted_string_type(
        "FunctionAddress", r"^\S.*:\w+$", docstring="A function, as my_rewards.py:shout or my_rewards:shout."
    )
    yaml.SafeDumper.add_representer(FunctionAddress, yaml.SafeDumper.represent_str)  # for config.yaml


class WeightedFunction(TypedDict, total=False):
    """One of several functions.

    Args:
        function: Address of the function.
        weight: Weight of its score in the sum.
    """

    function: Required[FunctionAddress]
    weight: float


def verifier_of(setting: Verifier | FunctionAddress | Sequence[FunctionAddress | WeightedFunction]) -> Verifier:
    """Returns the verifier that a setting describes.

    Raises:
        SettingError: A function cannot be a verifier.
    """
    return setting if isinstance(setting, Verifier) else FunctionReward(setting)


def try_functions(verifier: Verifier, problem: Problem, setting: str = "data.task.verifier") -> None:
    """Lets functions grade the gold answer and an empty response, in a process that can be killed.

    Args:
        verifier: Verifier, which is tried if it consists of functions.
        problem: Problem with its prefix and the columns that the functions ask for.
        setting: Name of the setting, for error messages.

    Raises:
        SettingError: A function cannot be loaded in the process, or gives no grade.
    """
    if not isinstance(verifier, FunctionReward):
        return
    answer = verifier.answer_in(problem.answer)
    with GradingPool(verifier, 1, SECONDS) as pool:
        for text in (_as_text(answer), ""):
            try:
                (grade,) = pool.grade([(problem.answer, problem.response_prefix + text)])
            except RuntimeError as error:
                raise SettingError(
                    f"{setting} is {verifier}, which does not start in a grading process: {reason(error)}"
                ) from error
            if grade.failure is not None:
                raise SettingError(
                    f"{setting} is {verifier}; tried on the first problem, {pool.first_failure}; it returns a "
                    "number, or a dict of parts with a score"
                )


def _as_text(answer: Any) -> str:
    first = answer[0] if isinstance(answer, list) and answer else answer
    return first if isinstance(first, str) else json.dumps(first)
