"""The verifier of Countdown as in TinyZero: one expression between answer tags.

It has its own parser and needs only the standard library, so a grading process starts fast and executes no input.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from popo_lightning.verifiers.base import Verifier, check_format_reward
from popo_lightning.verifiers.boxed import last_answer_tag

MAX_CHARACTERS = 500
MAX_DEPTH = 40
MAX_NUMBERS = 12
MAX_DIGITS = 9

_OPERATORS = {"×": "*", "·": "*", "÷": "/", "−": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])", re.ASCII)


class CountdownVerifier(Verifier):
    r"""Correct if the last `<answer>...</answer>` uses each number exactly once and its value is exactly the target.

    The gold is `{"numbers": [...], "target": int}`. Expressions have `+ - * /`, parentheses and signs (`-3+5`, as in
    Python, which TinyZero evaluates). As in TinyZero, `= target` after the expression is wrong, because it adds a
    number. Unlike in TinyZero, values are exact fractions, the tag may be on any line, `×`, `·`, `÷`, `−`, `\times`,
    `\cdot` and `\div` are also operators, and `2**3`, `7//2` and `1.5` for the numbers 1 and 5 are wrong.

    Components: acc is 1 if correct, format is 1 if there is an answer tag, score is 1 if correct, otherwise
    format_reward * format.

    Args:
        format_reward: Score of a wrong answer between answer tags, at least 0 and below 1.
    """

    def __init__(self, format_reward: float = 0.1) -> None:
        check_format_reward(format_reward)
        self.format_reward = format_reward

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Returns the reward components of one response."""
        expression = last_answer_tag(text)
        if expression is None:
            return {"score": 0.0, "acc": 0.0, "format": 0.0}
        right = float(value_of(expression, answer["numbers"]) == answer["target"])
        return {"score": right or float(self.format_reward), "acc": right, "format": 1.0}

    def check_answer(self, answer: Any) -> None:
        """Raises ValueError for anything but `{"numbers": [...], "target": ...}` with whole numbers within bounds.

        It does not check whether the target can be reached.
        """
        if not isinstance(answer, dict) or not {"numbers", "target"} <= set(answer):
            raise ValueError('the answer must be {"numbers": [...], "target": ...}')
        numbers, target = answer["numbers"], answer["target"]
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= MAX_NUMBERS:
            raise ValueError(f"the answer's numbers must be a list of 1 to {MAX_NUMBERS}")
        for number in numbers:
            if type(number) is not int or not 0 <= number < 10**MAX_DIGITS:
                raise ValueError(f"the answer's numbers contain {str(number)[:40]}, not a whole number from 0")
        if type(target) is not int or abs(target) >= 10 ** (MAX_DIGITS * 2):
            raise ValueError(f"the answer's target is {str(target)[:40]}, not a whole number")


def value_of(expression: str, numbers: list[int]) -> Fraction | None:
    """Returns the exact value of an expression that uses each number exactly once; None for any other text."""
    tokens = _tokens(expression)
    if tokens is None or sorted(int(token) for token in tokens if token.isdigit()) != sorted(numbers):
        return None
    try:
        return _Reader(tokens).value()
    except (_NoExpressionError, ZeroDivisionError):
        return None


def _tokens(expression: str) -> list[str] | None:
    if len(expression) > MAX_CHARACTERS:
        return None
    for written, operator in _OPERATORS.items():
        expression = expression.replace(written, operator)
    tokens, place = [], 0
    expression = expression.rstrip()
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if match is None or len(match[1]) > MAX_DIGITS or (match[1][0] == "0" and len(match[1]) > 1):
            return None
        tokens.append(match[1])
        place = match.end()
    return tokens


class _NoExpressionError(Exception):
    """The tokens are not an expression, or are nested too deeply."""


class _Reader:
    """Reads sums of products of signed factors, from left to right."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [*tokens, "end"]
        self._place = 0

    def value(self) -> Fraction:
        value = self._sum(0)
        if self._tokens[self._place] != "end":
            raise _NoExpressionError
        return value

    def _next(self) -> str:
        self._place += 1
        return self._tokens[self._place - 1]

    def _sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self._tokens[self._place] in ("+", "-"):
            if self._next() == "+":
                value += self._product(depth)
            else:
                value -= self._product(depth)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._factor(depth)
        while self._tokens[self._place] in ("*", "/"):
            if self._next() == "*":
                value *= self._factor(depth)
            else:
                value /= self._factor(depth)
        return value

    def _factor(self, depth: int) -> Fraction:
        sign = 1
        token = self._next()
        while token in ("+", "-"):
            sign = -sign if token == "-" else sign
            token = self._next()
        if token.isdigit():
            return sign * Fraction(int(token))
        if token != "(" or depth >= MAX_DEPTH:
            raise _NoExpressionError
        value = self._sum(depth + 1)
        if self._next() != ")":
            raise _NoExpressionError
        return sign * value
