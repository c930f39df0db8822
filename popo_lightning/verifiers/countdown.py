"""The verifier of Countdown as in TinyZero: one expression between answer tags.

It needs only the standard library, so a grading process starts fast. Python parses the expression but never runs it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from typing import Any

from popo_lightning.verifiers.base import Verifier, check_format_reward
from popo_lightning.verifiers.boxed import last_answer_tag

MAX_CHARACTERS = 500
MAX_DEPTH = 40
MAX_NUMBERS = 12
MAX_DIGITS = 9

_SPELLINGS = {"×": "*", "·": "*", "÷": "/", "−": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}
_ALL_TOKENS = re.compile(rf"(?:\s*(?:(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(?![0-9])|[-+*/()]))*", re.ASCII)
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS: dict[type, Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


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
    if sorted(int(token) for token in tokens if token.isdigit()) != sorted(numbers) or _depth(tokens) > MAX_DEPTH:
        return None
    try:
        return _value(ast.parse(" ".join(tokens), mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _tokens(expression: str) -> list[str]:
    """Splits an expression into numbers, operators and parentheses; none if it has anything else."""
    if len(expression) > MAX_CHARACTERS:
        return []
    for written, sign in _SPELLINGS.items():
        expression = expression.replace(written, sign)
    expression = expression.rstrip()
    return re.findall("[0-9]+|[-+*/()]", expression) if _ALL_TOKENS.fullmatch(expression) else []


def _depth(tokens: list[str]) -> int:
    return max(accumulate((token == "(") - (token == ")") for token in tokens), default=0)


def _value(node: ast.expr) -> Fraction:
    """Calculates an expression of Python's grammar; raises KeyError for anything but the four operations and signs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return _SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise KeyError(type(node))
