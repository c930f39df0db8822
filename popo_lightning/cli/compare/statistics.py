"""Means, intervals and differences over seeds, and the point where a curve reaches a value. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean, median, stdev

import numpy as np

COVERED = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with a confidence interval.

    Args:
        mean: Mean of the values; NaN without any.
        low: Lower end; NaN with fewer than two values.
        high: Upper end; NaN with fewer than two values.
        n: Number of values.
    """

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% t interval of the mean over the values.

    The ends are mean -+ t * std / sqrt(n), with the unbiased std and Student's t for n - 1 degrees of freedom. For
    normal values 95% of such intervals contain the true mean, for any n >= 2.
    """
    n = len(values)
    if n < 2:
        return Interval(values[0] if n else math.nan, math.nan, math.nan, n)
    mean = fmean(values)
    half = t_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def extent(values: Sequence[float]) -> Interval:
    """Mean, minimum and maximum; for costs, since a t interval over two seeds could be negative."""
    found = interval(values)
    return replace(found, low=min(values), high=max(values)) if found.n > 1 else found


@cache
def t_quantile(freedom: int, covered: float = COVERED) -> float:
    """The t for which Student's distribution has `covered` of its mass between -t and t.

    The mass is a finite sum of powers of the cosine of arctan(t / sqrt(freedom)) (Abramowitz and Stegun 26.7.3 and
    26.7.4); bisection finds the angle.

    Args:
        freedom: Degrees of freedom, at least 1.
        covered: Fraction of the mass, in (0, 1).
    """
    below, above = 0.0, math.pi / 2
    for _ in range(60):
        angle = (below + above) / 2
        below, above = (angle, above) if _mass_within(angle, freedom) < covered else (below, angle)
    return math.sqrt(freedom) * math.tan(below)


def _mass_within(angle: float, freedom: int) -> float:
    """Mass between -t and t, where t = sqrt(freedom) tan(angle)."""
    cosine, odd = math.cos(angle), freedom % 2
    term, terms = (cosine if odd else 1.0), 0.0
    for power in range(2 + odd, freedom + 1, 2):  # the terms are cos^(power - 2) times 1/2 3/4 ... or 2/3 4/5 ...
        terms += term
        term *= cosine**2 * (power - 1) / power
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * terms)
    return math.sin(angle) * terms


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Mean and t interval of the values minus the baseline's at the same seed.

    Seeds that either lacks are left out. An effect of the seed that both share cancels out.
    """
    return interval([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Mean, minimum and maximum of the ratio of the values to the baseline's at the same seed."""
    seeds = sorted(values.keys() & baseline.keys())
    return extent([values[seed] / baseline[seed] for seed in seeds if baseline[seed]])


def reached_at(curve: Sequence[float], target: float) -> float | None:
    """Index at which a curve first reaches the target; may be a fraction between two points.

    The curve is linear between points. None if it never reaches the target.
    """
    for place, value in enumerate(curve):
        if value >= target:
            if place == 0:
                return 0.0
            before = curve[place - 1]
            return place - 1 + (target - before) / (value - before)
    return None


def at(values: Sequence[float], place: float) -> float:
    """Value at a fractional index, by linear interpolation."""
    return float(np.interp(place, range(len(values)), values))


def median_reached(values: Sequence[float | None]) -> float:
    """Median in which None, "never reached", is infinite; dropping it would favor methods that often fail."""
    return median(math.inf if value is None else value for value in values)


def mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
