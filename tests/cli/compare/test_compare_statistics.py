"""Statistics over seeds, checked against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from popo_lightning.cli.compare.statistics import (
    at,
    extent,
    interval,
    mean,
    median_reached,
    paired,
    paired_ratio,
    reached_at,
    t_quantile,
)

Floats = NDArray[np.float64]


def covered_by(low: Floats, high: Floats) -> float:
    """Returns the share of the intervals that contain 0."""
    return float(((low <= 0) & (high >= 0)).mean())


def percentile_bootstrap(values: Floats) -> tuple[Floats, Floats]:
    """Returns, for each column, the ends of the middle 95% of the means of all possible resamples."""
    n = len(values)
    counts = np.array([np.bincount(drawn, minlength=n) for drawn in itertools.product(range(n), repeat=n)])
    low, high = np.percentile(counts @ values / n, (2.5, 97.5), axis=0, method="inverted_cdf")
    return low, high


@pytest.mark.parametrize(("n", "bootstrap"), [(3, 0.76), (5, 0.84)])
def test_95_percent_of_the_intervals_hold_the_mean(n: int, bootstrap: float) -> None:
    """For 10,000 times n normal seeds around 0, a share of 0.95 has a standard error of 0.0022, 0.8 of 0.004."""
    values = np.random.default_rng(n).normal(scale=0.02, size=(n, 10_000))
    found = [interval(seeds) for seeds in values.T.tolist()]
    assert covered_by(np.array([each.low for each in found]), np.array([each.high for each in found])) == pytest.approx(
        0.95, abs=0.007
    )
    assert covered_by(*percentile_bootstrap(values)) == pytest.approx(bootstrap, abs=0.015)  # far from 0.95


@pytest.mark.parametrize("n", [3, 5])
def test_95_percent_of_the_paired_differences_hold_the_true_one(n: int) -> None:
    """Seeds vary far more than the methods differ, which cancels out. The true difference is 0.03."""
    random = np.random.default_rng(10 + n)
    found = []
    for _ in range(3000):
        seeds = random.normal(scale=0.1, size=n)
        ours, theirs = seeds + 0.03 + random.normal(scale=0.01, size=n), seeds
        found.append(paired(dict(enumerate(ours.tolist())), dict(enumerate(theirs.tolist()))))
    held = sum(each.low <= 0.03 <= each.high for each in found) / len(found)
    assert held == pytest.approx(0.95, abs=0.014)  # the standard error is 0.004


@pytest.mark.parametrize(
    ("freedom", "covered", "expected"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (3, 0.95, 3.1824),
        (4, 0.95, 2.7764),
        (7, 0.95, 2.3646),
        (29, 0.95, 2.0452),
        (100, 0.95, 1.9840),
        (4, 0.99, 4.6041),
        (5, 0.5, 0.7267),
    ],
)
def test_quantiles_are_those_of_the_printed_tables(freedom: int, covered: float, expected: float) -> None:
    assert t_quantile(freedom, covered) == pytest.approx(expected, abs=1e-4)


def test_interval_by_hand() -> None:
    """0.1 0.2 0.6: mean 0.3, deviations -0.2 -0.1 0.3, variance 0.14 / 2 = 0.07; 4.3027 sqrt(0.07 / 3) = 0.65725."""
    found = interval([0.1, 0.2, 0.6])
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - 0.65725, 0.3 + 0.65725), abs=1e-5)
    assert found.n == 3


def test_two_seeds_say_little() -> None:
    """The std is 0.1 sqrt(2), so 0.1 sqrt(2) / sqrt(2) = 0.1 is multiplied by 12.706: wider than any accuracy."""
    found = interval([0.2, 0.4])
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - 1.27062, 0.3 + 1.27062), abs=1e-5)


def test_one_seed_has_no_interval() -> None:
    found = interval([0.25])
    assert found.mean == 0.25
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert interval([]).n == 0
    assert math.isnan(interval([]).mean)


def test_extent_is_the_least_and_the_largest() -> None:
    found = extent([3.0, 1.0, 5.0])
    assert (found.mean, found.low, found.high, found.n) == (3.0, 1.0, 5.0, 3)
    assert math.isnan(extent([2.0]).low) and extent([]).n == 0
    ratio = paired_ratio({1: 30.0, 2: 10.0}, {1: 60.0, 2: 40.0})
    assert (ratio.mean, ratio.low, ratio.high) == (0.375, 0.25, 0.5)


def test_paired_differences_are_by_seed() -> None:
    """Seeds differ by 0.5 and the methods by 0.1 each time. Pairing the seeds leaves no noise."""
    found = paired({1: 0.2, 2: 0.7, 9: 0.9}, {2: 0.6, 1: 0.1, 3: 0.0})
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.n == 2
    assert paired({1: 0.2}, {2: 0.6}).n == 0


@pytest.mark.parametrize(
    ("curve", "target", "place"),
    [
        ([0.1, 0.2, 0.4], 0.3, 1.5),
        ([0.1, 0.2, 0.4], 0.4, 2.0),
        ([0.1, 0.2, 0.4], 0.05, 0.0),
        ([0.1, 0.3, 0.2, 0.5], 0.25, 0.75),  # the first crossing; the curve falls afterwards
        ([0.1, 0.2, 0.2], 0.2, 1.0),
        ([0.1, 0.2, 0.4], 0.41, None),
        ([], 0.1, None),
    ],
)
def test_first_crossing(curve: list[float], target: float, place: float | None) -> None:
    assert reached_at(curve, target) == (None if place is None else pytest.approx(place))


def test_value_between_two_points() -> None:
    assert at([0, 40, 120], 1.25) == 60
    assert at([0, 40, 120], 2.0) == 120
    assert at([0, 40, 120], 0.0) == 0
    assert at([7], 0.0) == 7


def test_a_seed_that_never_arrives_counts() -> None:
    assert median_reached([10.0, None, 30.0]) == 30.0  # without it the median would be 20
    assert median_reached([10.0, None]) == median_reached([None, None, 5.0]) == math.inf
    assert median_reached([10.0, 20.0]) == 15.0


def test_mean_of_what_is_there() -> None:
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean([]))
