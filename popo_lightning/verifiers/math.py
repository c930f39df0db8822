"""The verifier of mathematics with a boxed final answer."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module, util
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.verifiers.base import Verifier, check_format_reward
from popo_lightning.verifiers.boxed import MAX_ANSWER_CHARACTERS, after_thinking, last_boxed
from popo_lightning.verifiers.equality.latex import UnreadableLatexError, canonical
from popo_lightning.verifiers.equality.rules import same_answer

MAX_GOLDS = 64


class MathVerifier(Verifier):
    r"""Correct if the last `\boxed{...}` of the response equals the gold answer, as `equality` defines it.

    The gold is a string, or a list of strings of which any is correct. Several required values form one string, `1,-2`.
    The box must follow `</think>` if the response has that tag.

    Components: acc is 1 if correct, format is 1 if there is a box, score is 1 if correct, otherwise format_reward *
    format.

    Args:
        format_reward: Score of a wrong answer in a box, at least 0 and below 1. Above 0, a group whose responses differ
            only in having a box is effective.
        require_think: Count a response without `</think>` as wrong, for models that always think in tags.
    """

    def __init__(self, format_reward: float = 0.0, require_think: bool = False) -> None:
        check_format_reward(format_reward)
        require_computer_algebra()
        self.format_reward = format_reward
        self.require_think = require_think

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loads computer algebra when a grading process unpickles the verifier, before its first response."""
        self.__dict__.update(state)
        import_module("popo_lightning.verifiers.equality.symbolic")

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Returns the reward components of one response."""
        rest = after_thinking(text, self.require_think)
        boxed = None if rest is None else last_boxed(rest)
        if boxed is None:
            return {"score": 0.0, "acc": 0.0, "format": 0.0}
        right = float(any(is_right(gold, boxed) for gold in gold_strings(answer)))
        return {"score": right or float(self.format_reward), "acc": right, "format": 1.0}

    def check_answer(self, answer: Any) -> None:
        r"""Raises ValueError for an answer that is not a gold answer, or that no box could contain readably.

        It takes some ten microseconds. It does not check whether computer algebra can read the answer; if not, only the
        same spelling is correct, as for `\text{Evelyn}`.
        """
        for gold in gold_strings(answer):
            if len(gold) > MAX_ANSWER_CHARACTERS:
                raise ValueError(
                    f"the answer has {len(gold)} characters and at most {MAX_ANSWER_CHARACTERS} are compared"
                )
            try:
                read = _canonical_gold(gold)
            except UnreadableLatexError as error:
                raise ValueError(f"the answer {gold[:80]!r} cannot be read: {error}") from error
            if not read:
                raise ValueError(f"the answer {gold[:80]!r} is empty")


def gold_strings(answer: Any) -> list[str]:
    """Returns the accepted gold strings of an answer in JSON types. Numbers become text."""
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or len(answers) > MAX_GOLDS:
        raise ValueError(f"the answer is a list of {len(answers)} strings and 1 to {MAX_GOLDS} make sense")
    for one in answers:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ValueError(f"the answer is {str(one)[:80]!r} and must be a string or a list of strings")
    return [str(one) for one in answers]


def is_right(gold: str, boxed: str) -> bool:
    """Returns whether the box contains the gold answer."""
    try:
        return same_answer(_canonical_gold(gold), canonical(boxed))
    except UnreadableLatexError:
        return False


@lru_cache(maxsize=4096)
def _canonical_gold(gold: str) -> str:
    return canonical((last_boxed(gold) or gold) if re.search(r"\\f?box", gold) else gold)


def require_computer_algebra() -> None:
    """Raises SettingError if math-verify is not installed, before any grading process starts."""
    if util.find_spec("math_verify") is None or util.find_spec("latex2sympy2_extended") is None:
        raise SettingError(
            "data.task.verifier needs math-verify, which is not installed; run pip install 'math-verify[antlr4_13_2]'"
        )
