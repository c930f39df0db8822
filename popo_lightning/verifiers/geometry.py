"""The verifier of geometry with a diagram (Geometry3K), following MoPPS."""

from __future__ import annotations

import re
from typing import Any

from popo_lightning.verifiers.boxed import after_thinking, last_boxed
from popo_lightning.verifiers.math import MathVerifier, gold_strings, is_right

_UNIT = re.compile(
    r"(?<=[\d)}a-z])\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?(?:sq(?:uare|\.)?\s*)?"
    r"(?:centimeters?|meters?|millimeters?|kilometers?|inch(?:es)?|feet|foot|yards?|miles?|units?|degrees?|cm|mm|km|"
    r"ft|yd|in|m)\.?\s*(?:\})?\s*(?:\^\s*\{?\s*[23]\s*\}?|[²³])?\s*\$?\s*$"
)

_OTHER_SIGN = re.compile(r"%|\\\$|[€£₹¥¢°]|\\circ")


class GeometryVerifier(MathVerifier):
    r"""Correct if the last `\boxed{...}` is the gold: a number, an expression, or a statement about the figure.

    Answers are compared as by `MathVerifier`, without units of length and area. A choice letter alone is not an answer.

    Components: acc is 1 if correct, format is 1 for `<think>...</think>` followed by a box, score is 1 if correct,
    otherwise format_reward * format.

    Args:
        format_reward: Score of a wrong answer in the right format, at least 0 and below 1.
    """

    def __init__(self, format_reward: float = 0.1) -> None:
        super().__init__(format_reward)

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Returns the reward components of one response."""
        thought, tag, _ = text.rpartition("</think>")
        boxed = last_boxed(after_thinking(text) or "")
        in_format = float(bool(tag) and "<think>" in thought and boxed is not None)
        right = float(boxed is not None and any(is_right_figure(gold, boxed) for gold in gold_strings(answer)))
        return {"score": right or self.format_reward * in_format, "acc": right, "format": in_format}


def is_right_figure(gold: str, boxed: str) -> bool:
    """Returns whether the box contains the gold answer, without regard to units of length and area."""
    if is_right(gold, boxed):
        return True
    bare = _without_unit(gold), _without_unit(boxed)
    if any(_OTHER_SIGN.search(text) and text == whole for text, whole in zip(bare, (gold, boxed), strict=True)):
        return False  # one is a percentage, money or degrees, the other a length
    return bare != (gold, boxed) and is_right(*bare)


def _without_unit(text: str) -> str:
    return _UNIT.sub("", text.strip()) if len(text) <= 300 else text
