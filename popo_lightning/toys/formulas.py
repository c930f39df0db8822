"""Calculations with the numbers of a diagram, correct ones and typical mistakes: numbers in, steps out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt

from popo_lightning.toys.countdown import Step

Formula = Callable[..., list[Step]]


# -- right for some diagram --------------------------------------------------------------------------------------------


def supplement(a: int) -> list[Step]:
    """What is left of a straight line."""
    return [(180, "-", a, 180 - a)]


def apex(a: int) -> list[Step]:
    """Angle at the top of an isosceles triangle with this angle at its base."""
    return [(a, "+", a, 2 * a), (180, "-", 2 * a, 180 - 2 * a)]


def third_angle(a: int, b: int) -> list[Step]:
    """What is left of a triangle's angles."""
    return [(a, "+", b, a + b), (180, "-", a + b, 180 - a - b)]


def total(a: int, b: int) -> list[Step]:
    """The exterior angle of a triangle is the sum of the two angles that it does not touch."""
    return [(a, "+", b, a + b)]


def product(a: int, b: int) -> list[Step]:
    """Area of a rectangle."""
    return [(a, "*", b, a * b)]


def around(a: int, b: int) -> list[Step]:
    """Perimeter of a rectangle."""
    return [(a, "+", b, a + b), (2, "*", a + b, 2 * (a + b))]


def half_product(a: int, b: int) -> list[Step]:
    """Area of a right triangle; the product must be even."""
    return [(a, "*", b, a * b), (a * b, "/", 2, a * b // 2)]


def hypotenuse(a: int, b: int) -> list[Step]:
    """Third side of a right triangle from its legs: a square over its root is the root."""
    square = a * a + b * b
    return [(a * a, "+", b * b, square), (square, "/", isqrt(square), isqrt(square))]


def leg(a: int, c: int) -> list[Step]:
    """Third side of a right triangle from a leg and the hypotenuse."""
    square = c * c - a * a
    return [(c * c, "-", a * a, square), (square, "/", isqrt(square), isqrt(square))]


# -- right for none ----------------------------------------------------------------------------------------------------


def complement(a: int) -> list[Step]:
    """Taking a straight angle for a right one."""
    return [(90, "-", a, 90 - a)]


def twice(a: int) -> list[Step]:
    """Stopping before the last step of an apex."""
    return [(a, "+", a, 2 * a)]


def difference(a: int, b: int) -> list[Step]:
    """The larger less the smaller."""
    a, b = max(a, b), min(a, b)
    return [(a, "-", b, a - b)]


def without_first(a: int, b: int) -> list[Step]:
    """Forgetting the second number."""
    return supplement(a)


def without_second(a: int, b: int) -> list[Step]:
    """Forgetting the first number."""
    return supplement(b)


def sum_of_squares(a: int, b: int) -> list[Step]:
    """Forgetting the root."""
    return [(a * a, "+", b * b, a * a + b * b)]


def difference_of_squares(a: int, b: int) -> list[Step]:
    """Forgetting the root."""
    a, b = max(a, b), min(a, b)
    return [(a * a, "-", b * b, a * a - b * b)]


def whole(steps: Sequence[Step]) -> bool:
    """Whether no result is negative and no division leaves a rest."""
    return all(result >= 0 and (op != "/" or right * result == left) for left, op, right, result in steps)
