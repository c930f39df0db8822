r"""Equality by computer algebra: latex2sympy reads, math-verify compares. Imported only in grading processes.

math-verify's own `parse` is not used. It looks for answers in prose with regular expressions that backtrack, falls back
to SymPy's `parse_expr`, which is `eval`, and writes all symbols in lower case, so that `M` equals `m`. Its time limits
are also off, because they are alarms, which C code does not receive. The grading process has its own limit.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy.core.relational import Relational

from popo_lightning.verifiers.equality.limits import is_affordable
from popo_lightning.verifiers.equality.numbers import PlainNumber, without_repeating

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its time limits are off

_CONVERSION = ConversionConfig(lowercase_symbols=False)
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
_DECIMAL = re.compile(r"(\d*)\.(\d+)")
_NUMERATORS = [range(9001 + 5003 * k, 9001 + 5003 * k + 977 * 12, 977) for k in range(2)]
_CONSTANTS = {"e", "i"}
_DIGITS = 40
_AGREEING_DIGITS = 25
_MOST_DIGITS = 20_000
_POINTS = tuple(tuple(sympy.Rational(n, 7919 + 2 * k) for k, n in enumerate(numbers)) for numbers in _NUMERATORS)


@lru_cache(maxsize=4096)
def symbolically_equal(gold: str, answer: str) -> bool:
    """Returns whether two canonical texts are exactly the same number, expression, relation, set or matrix."""
    if not _letters(answer) <= _letters(gold) | _CONSTANTS:
        return False  # an answer with symbols that the gold lacks need not be read
    complex_numbers = any(_IMAGINARY.search(text) for text in (gold, answer))
    one, other = _read(gold, complex_numbers), _read(answer, complex_numbers)
    if one is None or other is None:
        return False
    try:
        return _same(one, other)
    except Exception:  # objects that SymPy cannot compare are not equal; its errors have no common base class
        return False


def _same(gold: Any, answer: Any) -> bool:
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return _same_relation(gold, answer)
    if not _comparable(gold, answer):
        return False
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _same_expression(gold, answer)
    return bool(verify(gold, answer, timeout_seconds=None, float_rounding=12))


@lru_cache(maxsize=4096)
def meets_decimal(gold: PlainNumber, answer: str) -> bool:
    r"""Returns whether an answer such as `\frac{\sqrt{3}}{2}` has the value of a decimal gold, within its tolerance."""
    value = value_of(answer)
    return value is not None and gold.is_met_by(value)


@lru_cache(maxsize=4096)
def value_of(text: str) -> Fraction | None:
    r"""Returns the value of a real constant such as `\frac{\sqrt{3}}{2}`, to 30 digits; None for anything else."""
    if not _letters(text) <= _CONSTANTS:
        return None
    read = _read(text, complex_numbers=False)
    if not isinstance(read, sympy.Expr) or read.free_symbols:
        return None
    value = sympy.N(read, 30)
    if not (value.is_Float or value.is_Rational) or not value.is_finite:
        return None
    exact = sympy.Rational(value)
    return Fraction(int(exact.p), int(exact.q))


@lru_cache(maxsize=8192)
def _read(text: str, complex_numbers: bool) -> Any:
    """Reads a text as a SymPy object; None if it may not or cannot be read."""
    text = without_repeating(text)
    if not is_affordable(text):
        return None
    exact = _DECIMAL.sub(lambda match: rf"\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}", text)
    try:
        read = latex2sympy(exact, is_real=not complex_numbers, normalization_config=None, conversion_config=_CONVERSION)
    except Exception:  # the reader raises bare Exceptions, and SymPy raises others
        return None
    return read if isinstance(read, (sympy.Basic, sympy.MatrixBase)) else None


def _same_expression(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Compares constants by their digits, and functions at sample points first, then by simplification."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not symbols:
        return _same_constant(gold.doit(), answer.doit())
    for point in _POINTS:
        values = dict(zip(symbols, point, strict=False))
        if _agree(gold.subs(values), answer.subs(values)) is False:
            return False
    return bool(verify(gold, answer, timeout_seconds=None, float_rounding=12))


def _same_constant(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    if gold.is_Rational and answer.is_Rational:
        return bool(gold == answer)
    size = max(abs(sympy.N(gold, 5)), abs(sympy.N(answer, 5)))
    digits_before_the_point = int(sympy.N(sympy.log(size, 10), 5)) if size > 1 else 0
    return digits_before_the_point < _MOST_DIGITS and _agree(gold, answer, digits_before_the_point) is True


def _agree(gold: sympy.Expr, answer: sympy.Expr, more_digits: int = 0) -> bool | None:
    """Returns whether two constants are equal relative to their size; None if one has no finite value."""
    one, other = sympy.N(gold, _DIGITS + more_digits), sympy.N(answer, _DIGITS + more_digits)
    if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
        return True if one == other else None
    largest = max(abs(one), abs(other))
    return bool(one == other or abs(one - other) <= largest * sympy.Rational(1, 10 ** (_AGREEING_DIGITS + more_digits)))


def _same_relation(gold: Relational, answer: Relational) -> bool:
    """Returns whether one relation is a constant times the other, without solving them.

    math-verify solves both, which may take minutes, and calls them equal if neither has a solution.
    """
    kind, difference = _standard(gold)
    also, other = _standard(answer)
    if kind is not also or not other.free_symbols or other.free_symbols != difference.free_symbols:
        return False
    points = [dict(zip(sorted(other.free_symbols, key=str), point, strict=False)) for point in _POINTS]
    ratios = [sympy.N(difference.subs(point) / other.subs(point), _DIGITS) for point in points]
    if not all(ratio.is_number and ratio.is_finite for ratio in ratios):
        return False
    factor = ratios[0]
    keeps_sign = factor != 0 if kind is sympy.Eq else factor.is_positive
    if not keeps_sign or any(_agree(factor, ratio) is False for ratio in ratios):
        return False
    if sympy.simplify(difference / other).is_constant():
        return True
    return bool(sympy.expand(difference * other.subs(points[0]) - other * difference.subs(points[0])) == 0)


def _standard(relation: Relational) -> tuple[type[Relational], sympy.Expr]:
    """Rewrites a relation as x = 0, x > 0 or x >= 0. Returns its type and x."""
    if isinstance(relation, (sympy.StrictLessThan, sympy.LessThan)):
        relation = relation.reversed
    return type(relation), relation.lhs - relation.rhs


def _letters(text: str) -> set[str]:
    """Returns the letters outside commands, which are symbols."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\(?:begin|end)\{[a-z]+\}|\\[A-Za-z]+", " ", text)))


def _comparable(gold: Any, answer: Any) -> bool:
    """Returns whether math-verify can compare the two. It would take the right side of any equation as an answer."""
    if _is_relation(answer):
        return _is_relation(gold) and bool(answer.free_symbols) and answer.free_symbols == gold.free_symbols
    if _is_relation(gold):
        return isinstance(answer, sympy.Set) and not isinstance(answer, sympy.FiniteSet)
    containers = (sympy.Set, sympy.Tuple, sympy.MatrixBase)
    return isinstance(gold, containers) == isinstance(answer, containers)


def _is_relation(read: Any) -> bool:
    return isinstance(read, Relational) or (isinstance(read, sympy.Basic) and read.func.__name__ == "And")
