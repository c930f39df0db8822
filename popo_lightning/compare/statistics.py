"""Means, intervals and differences over seeds, and when a curve reaches a value. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 0
COVERED = (2.5, 97.5)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Args:
        mean: Of the values; NaN without any.
        low: Lower end of the 95% interval; NaN with fewer than two values.
        high: Upper end.
        n: How many values.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Median:
    """A median over seeds of which some never got there.

    Args:
        value: The median with those counted as infinite; None where that makes it infinite, and without any value.
        reached: How many got there.
        n: Of how many.
    """

    value: float | None
    reached: int
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% percentile bootstrap interval over the values."""
    if not values:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean, low, high = curve_interval([[value] for value in values])
    return Interval(float(mean[0]), float(low[0]), float(high[0]), len(values))


def curve_interval(curves: Sequence[Sequence[float]]) -> tuple[Floats, Floats, Floats]:
    """Mean, lower and upper end at each place of curves of equal length, one a seed.

    Seeds are resampled as wholes, with the same draws at every place and in every call.
    """
    values = np.asarray(curves, dtype=np.float64)
    n = len(values)
    mean = values.mean(axis=0)
    if n < 2:
        nothing = np.full_like(mean, math.nan)
        return mean, nothing, nothing
    drawn = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    counts = np.apply_along_axis(np.bincount, 1, drawn, minlength=n).astype(np.float64)
    low, high = np.percentile(counts @ values / n, COVERED, axis=0)
    return mean, low, high


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Values minus the baseline's at the same seed; seeds that one of them lacks are left out."""
    return interval([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Values as multiples of the baseline's at the same seed."""
    seeds = sorted(values.keys() & baseline.keys())
    return interval([values[seed] / baseline[seed] for seed in seeds if baseline[seed]])


def reached_at(curve: Sequence[float], target: float) -> float | None:
    """Where a curve first comes to the target: the index of a point, or a fraction between two of them.

    Straight lines are drawn between the points. None if it never gets there.
    """
    for place, value in enumerate(curve):
        if value >= target:
            if place == 0:
                return 0.0
            before = curve[place - 1]
            return place - 1 + (target - before) / (value - before)
    return None


def at(values: Sequence[float], place: float) -> float:
    """The value at a place between two points."""
    below = min(int(place), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def median(values: Sequence[float | None]) -> Median:
    """Median in which None, "never", is above every number: dropping it would flatter who often fails."""
    ordered = sorted(math.inf if value is None else value for value in values)
    n = len(ordered)
    reached = sum(math.isfinite(value) for value in ordered)
    if not n:
        return Median(None, 0, 0)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Median(middle if math.isfinite(middle) else None, reached, n)


def mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
