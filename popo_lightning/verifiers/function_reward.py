"""Plain functions as the verifier: one, or several whose weighted sum is the score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.scalars import plain_scalar
from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.function import SETTING, RewardFunction

ENVELOPE = {"answer", "columns"}  # keys of an answer that carries the columns the functions ask for


class FunctionReward(Verifier):
    """Grades by functions, each called with the arguments that its parameters name.

    A function may ask for `text` (or `response`), `answer`, `prompt` (as it was asked), `question` (the row's column,
    or else the prompt) and any other column of the row; `**columns` gets all of them. It returns a number, the score,
    or a dict of components with a `score`.

    With several functions, each score is a component under its function's name, and `score` is their weighted sum.
    Further components keep their names; if a name is taken, the function's name is put before it. `acc` is the
    component of that name, or else the score of the first function.

    Args:
        function: Address of a function, or a list of addresses and of mappings with `function` and `weight`.

    Raises:
        SettingError: A function cannot be called, a weight is not a number, or two functions have the same name.
    """

    def __init__(self, function: str | Sequence[str | Mapping[str, Any]]) -> None:
        self.alone = isinstance(function, str)
        given: Sequence[Any] = [function] if isinstance(function, str) else function
        if not given:
            raise SettingError(f"{SETTING} is an empty list; name at least one function, as my_rewards.py:shout")
        self.functions: list[RewardFunction] = []
        self.weights: list[float] = []
        for one in given:
            if not isinstance(one, str) and not (isinstance(one, Mapping) and isinstance(one.get("function"), str)):
                raise SettingError(
                    f"{SETTING} has {one!r}; give my_rewards.py:shout, or a mapping of function and weight"
                )
            address, weight = (one, 1.0) if isinstance(one, str) else (one["function"], one.get("weight", 1.0))
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise SettingError(f"{SETTING} gives {address} the weight {weight!r}; use a finite number, such as 0.5")
            self.functions.append(RewardFunction(address))
            self.weights.append(float(weight))
        names = [function.name for function in self.functions]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise SettingError(f"{SETTING} has two functions called {twice}, whose components would be one; rename one")
        if not self.alone and "score" in names:
            raise SettingError(f"{SETTING} has a function called score, as the weighted sum is; rename it")
        if not any(self.weights):
            raise SettingError(f"{SETTING} gives every function the weight 0, so that nothing is learned; raise one")

    def __str__(self) -> str:
        return ", ".join(function.address for function in self.functions)

    def columns(self) -> list[str]:
        """Returns the columns of a row without which a function cannot be called."""
        return list(dict.fromkeys(name for function in self.functions for name in function.columns()))

    def gold(self, answer: Any, columns: Mapping[str, Any]) -> Any:
        """Returns the answer for the grading process, with the columns that the functions ask for, if any."""
        wanted: dict[str, Any] = {}
        for function in self.functions:
            asked = function.wanted(columns)
            wanted |= {name: value for name, value in asked.items() if not function.takes_all or _is_plain(value)}
        return {"answer": answer, "columns": wanted} if wanted else answer

    @staticmethod
    def answer_in(gold: Any) -> Any:
        """Returns the answer without columns from the result of :meth:`gold`."""
        return gold["answer"] if _has_columns(gold) else gold

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Returns the reward components of one response. The grading process handles a function's exceptions."""
        columns: Mapping[str, Any] = answer["columns"] if _has_columns(answer) else {}
        answer = self.answer_in(answer)
        if self.alone:
            parts: dict[str, float] = self.functions[0](answer, text, columns)
            return parts
        parts = {}
        scores: list[float] = []
        for function in self.functions:
            given = function(answer, text, columns)
            others = dict(given) if isinstance(given, dict) else {"score": given}
            scores.append(_number(others.pop("score", None), function.name, given))
            parts[function.name if function.name not in parts else f"{function.name}_score"] = scores[-1]
            for name, value in others.items():
                parts[name if name not in parts else f"{function.name}_{name}"] = value
        weighted = (weight * score for weight, score in zip(self.weights, scores, strict=True))
        return {"score": sum(weighted), "acc": scores[0], **parts}


def _has_columns(gold: Any) -> bool:
    return isinstance(gold, dict) and gold.keys() == ENVELOPE


def _number(score: Any, name: str, given: Any) -> float:
    score = plain_scalar(score)
    if not isinstance(score, Real):
        raise TypeError(f"{name} returned {given!r}, neither a number nor a dict with a number as its score")
    return float(score)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
