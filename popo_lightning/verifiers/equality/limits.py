"""Limits of the expressions passed to computer algebra: a whitelist, and bounds on all that grows faster than its text.

Refusing takes microseconds. It need not be perfect: an expression that passes and runs too long is killed with its
grading process.
"""

from __future__ import annotations

import math
import re

from popo_lightning.verifiers.equality.commands import OPERATORS
from popo_lightning.verifiers.equality.latex import commands, without_commands

MAX_CHARACTERS = 320
MAX_DEPTH = 12
MAX_DIGITS = 60
MAX_EXPONENT = 5_000
MAX_GROUP_EXPONENT = 60
MAX_TOWER_NUMBER = 4
MAX_FACTORIAL = 2_100
MAX_BINOMIAL = 5_000
MAX_LETTERS = 3
MAX_COUNTS = {"!": 8, r"\binom": 6, "&": 30, r"\\": 12, r"\sqrt": 12, r"\frac": 16, "^": 24}

_GREEK = "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi omega eta xi kappa Delta Omega"
_SYMBOLS = "frac sqrt binom pi cdot times div pm mp infty cup cap leq geq neq begin end lfloor rfloor lceil rceil"
ALLOWED_COMMANDS = frozenset("\\" + name for name in [*OPERATORS, *_GREEK.split(), *_SYMBOLS.split()])

_ALLOWED_CHARACTERS = re.compile(r"[A-Za-z0-9+\-*/^_(){}\[\]|!<>=.,%&\\ ]*", re.ASCII)
_MATRIX = re.compile(r"\\(?:begin|end)\{[pbv]matrix\}")
_MISREAD = re.compile(
    r"\d_"  # 52_8, read as 52
    r"|\d[eE][-+]?\d"  # 4.5e33, read as 4.5 times Euler's number times 33
    r"|\d \d"  # 5 5, read as 10
    r"|!!"  # read as a factorial of a factorial
    r"|[\]}]!"  # a factorial of neither a number nor a sum
    r"|\^\w\^"  # a tower without braces
    r"|(?:\[[^\]]*){4}"  # lists of lists of lists
    r"|\.\.|\.(?!\d)",  # dots that replace something
    re.DOTALL,
)
_SMALL_SUM = re.compile(r"\([A-Za-z0-9+-]{1,12}\)!")
_POWER = re.compile(r"\^(?:\{([^{}]*)\}|(\w)|(\{|\\))")


def is_affordable(text: str) -> bool:
    """Returns whether computer algebra reads this canonical text as intended, and in time."""
    return (
        0 < len(text) <= MAX_CHARACTERS
        and _ALLOWED_CHARACTERS.fullmatch(text) is not None
        and _is_understood(text)
        and _depth(text) <= MAX_DEPTH
        and max(map(len, re.findall(r"\d+", text)), default=0) <= MAX_DIGITS
        and _powers_are_small(text)
        and _counts_are_small(text)
    )


def _is_understood(text: str) -> bool:
    bare = _MATRIX.sub("", text)
    environments = r"\begin" in bare or r"\end" in bare  # environments other than matrices
    words = re.search(rf"[A-Za-z]{{{MAX_LETTERS + 1},}}", without_commands(bare))
    return not environments and words is None and not _MISREAD.search(text) and commands(text) <= ALLOWED_COMMANDS


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _powers_are_small(text: str) -> bool:
    """Returns whether exponents are small. Bounds are tighter in towers, and on groups, whose powers multiply."""
    for match in _POWER.finditer(text):
        exponent = match[1] or match[2] or ""
        if match[3] is not None:  # the exponent holds another group
            exponent = _group(text, match.start() + 1)
        numbers = [int(digits) for digits in re.findall(r"\d+", exponent)]
        before = text[match.start() - 1 : match.start()]
        limit = MAX_GROUP_EXPONENT if before in ")]}" and before else MAX_EXPONENT
        if "^" in exponent:
            limit = MAX_TOWER_NUMBER
            if exponent.count("^") > 1 or "!" in exponent:
                return False
        if "!" in exponent or any(number > limit for number in numbers):
            return False
        if sum(number > 1 for number in numbers) > 1 and max(numbers) > MAX_GROUP_EXPONENT and "*" in exponent:
            return False
    on_groups = math.prod(max(int(number), 1) for number in re.findall(r"[)\]}]\^\{?(\d+)", text))
    return on_groups <= MAX_EXPONENT


def _group(text: str, start: int) -> str:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0 and text[place] == "}":
            return text[start : place + 1]
    return text[start:]


def _counts_are_small(text: str) -> bool:
    if any(text.count(sign) > most for sign, most in MAX_COUNTS.items()):
        return False
    if "!" in text and (_largest(text) > MAX_FACTORIAL or text.count(")!") != len(_SMALL_SUM.findall(text))):
        return False
    return r"\binom" not in text or _largest(text) <= MAX_BINOMIAL


def _largest(text: str) -> int:
    return max((int(digits) for digits in re.findall(r"\d+", text)), default=0)
