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

SECONDS = 60.0  # time limit for one response of the trial
REMEDIES = {
    "error": "correct the function; a response may be any text",
    "invalid": "return a number, or a dict of numbers with a score, each under a plain name",
    "timeout": f"it has to end within {SECONDS:g} s here, and within data.grading_timeout in the run",
    "crash": "it must not end the process that it is called in",
}

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


def try_functions(verifier: Verifier, problem: Problem) -> None:
    """Lets functions grade the gold answer and an empty response, in a process that can be killed.

    Args:
        verifier: Verifier, which is tried if it consists of functions.
        problem: Problem with its prefix and the columns that the functions ask for.

    Raises:
        SettingError: A function cannot be loaded in the process, or gives no grade.
    """
    if not isinstance(verifier, FunctionReward):
        return
    tried = {"the gold answer of": answer_text(problem.answer), "an empty response to": ""}
    with GradingPool(verifier, 1, SECONDS, "the limit of this trial") as pool:
        for what, text in tried.items():
            try:
                (grade,) = pool.grade([(problem.answer, problem.response_prefix + text)])
            except RuntimeError as error:
                raise SettingError(
                    f"data.task.verifier is {verifier}, which does not start in a grading process: {reason(error)}"
                ) from error
            if grade.failure is not None:
                raise SettingError(
                    f"data.task.verifier is {verifier}; tried on {what} the first problem, {pool.first_failure}; "
                    f"{REMEDIES[grade.failure]}"
                )


def answer_text(answer: Any) -> str:
    """Returns a problem's gold answer as the text of a response."""
    plain = FunctionReward.answer_in(answer)
    first = plain[0] if isinstance(plain, list) and plain else plain
    return first if isinstance(first, str) else json.dumps(first)
