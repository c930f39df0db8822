"""Calculations with the numbers of a diagram, correct ones and typical mistakes. Each maps numbers to steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt

from popo_lightning.toys.countdown import Step

Formula = Callable[..., list[Step]]


# -- correct for some diagram ------------------------------------------------------------------------------------------


def supplement(a: int) -> list[Step]:
    """Computes the other angle at a straight line."""
    return [(180, "-", a, 180 - a)]


def apex(a: int) -> list[Step]:
    """Computes the apex angle of an isosceles triangle with this base angle."""
    return [(a, "+", a, 2 * a), (180, "-", 2 * a, 180 - 2 * a)]


def third_angle(a: int, b: int) -> list[Step]:
    """Computes a triangle's third angle."""
    return [(a, "+", b, a + b), (180, "-", a + b, 180 - a - b)]


def total(a: int, b: int) -> list[Step]:
    """Computes a triangle's exterior angle as the sum of the two angles that it does not touch."""
    return [(a, "+", b, a + b)]


def product(a: int, b: int) -> list[Step]:
    """Computes the area of a rectangle."""
    return [(a, "*", b, a * b)]


def around(a: int, b: int) -> list[Step]:
    """Computes the perimeter of a rectangle."""
    return [(a, "+", b, a + b), (2, "*", a + b, 2 * (a + b))]


def half_product(a: int, b: int) -> list[Step]:
    """Computes the area of a right triangle; the product must be even."""
    return [(a, "*", b, a * b), (a * b, "/", 2, a * b // 2)]


def hypotenuse(a: int, b: int) -> list[Step]:
    """Computes the hypotenuse of a right triangle from its legs. A square is divided by its root to give the root."""
    square = a * a + b * b
    return [(a * a, "+", b * b, square), (square, "/", isqrt(square), isqrt(square))]


def leg(a: int, c: int) -> list[Step]:
    """Computes the other leg of a right triangle from a leg and the hypotenuse."""
    square = c * c - a * a
    return [(c * c, "-", a * a, square), (square, "/", isqrt(square), isqrt(square))]


# -- correct for none --------------------------------------------------------------------------------------------------


def complement(a: int) -> list[Step]:
    """Mistakes a straight angle for a right angle."""
    return [(90, "-", a, 90 - a)]


def twice(a: int) -> list[Step]:
    """Stops before the last step of :func:`apex`."""
    return [(a, "+", a, 2 * a)]


def difference(a: int, b: int) -> list[Step]:
    """Subtracts the smaller number from the larger."""
    a, b = max(a, b), min(a, b)
    return [(a, "-", b, a - b)]


def without_first(a: int, b: int) -> list[Step]:
    """Forgets the second number, and subtracts only the first from 180."""
    return supplement(a)


def without_second(a: int, b: int) -> list[Step]:
    """Forgets the first number, and subtracts only the second from 180."""
    return supplement(b)


def sum_of_squares(a: int, b: int) -> list[Step]:
    """Forgets the root of :func:`hypotenuse`."""
    return [(a * a, "+", b * b, a * a + b * b)]


def difference_of_squares(a: int, b: int) -> list[Step]:
    """Forgets the root of :func:`leg`."""
    a, b = max(a, b), min(a, b)
    return [(a * a, "-", b * b, a * a - b * b)]


def whole(steps: Sequence[Step]) -> bool:
    """Returns whether no result is negative and no division leaves a remainder."""
    return all(result >= 0 and (op != "/" or right * result == left) for left, op, right, result in steps)
