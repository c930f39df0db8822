"""Statistics over seeds against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from popo_lightning.compare.statistics import (
    at,
    curve_interval,
    interval,
    mean,
    median,
    paired,
    paired_ratio,
    reached_at,
)


def exact_percentile_interval(values: list[float]) -> tuple[float, float]:
    """Every resample there is, instead of ten thousand drawn ones."""
    means = sorted(sum(drawn) / len(values) for drawn in itertools.product(values, repeat=len(values)))
    return means[int(0.025 * len(means))], means[math.ceil(0.975 * len(means)) - 1]


def test_interval_is_that_of_all_resamples() -> None:
    values = [0.1, 0.2, 0.4, 0.8, 0.9]
    found = interval(values)
    low, high = exact_percentile_interval(values)
    assert found.mean == pytest.approx(0.48)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.011)
    assert found.n == 5
    assert interval(values) == found, "the same draws every time"


def test_two_seeds_span_the_interval() -> None:
    """A quarter of the resamples is one seed twice, so that the ends are the seeds themselves."""
    found = interval([0.2, 0.4])
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.2, 0.4))


def test_one_seed_has_no_interval() -> None:
    found = interval([0.25])
    assert found.mean == 0.25
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert interval([]).n == 0
    assert math.isnan(interval([]).mean)


def test_curve_interval_resamples_whole_seeds() -> None:
    mean_, low, high = curve_interval([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    assert mean_.tolist() == [0.5, 0.5]
    assert low[0] == pytest.approx(1 - high[1])  # the two places mirror each other, resample by resample
    single = interval([0.0, 1.0, 0.5])
    assert (low[0], high[0]) == pytest.approx((single.low, single.high))


def test_paired_differences_are_by_seed() -> None:
    """Seeds differ by 0.5 and the methods by 0.1 each time: nothing is left to chance once seeds are paired."""
    found = paired({1: 0.2, 2: 0.7, 9: 0.9}, {2: 0.6, 1: 0.1, 3: 0.0})
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.n == 2
    assert paired({1: 0.2}, {2: 0.6}).n == 0
    assert paired_ratio({1: 30.0, 2: 10.0}, {1: 60.0, 2: 40.0}).mean == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("curve", "target", "place"),
    [
        ([0.1, 0.2, 0.4], 0.3, 1.5),
        ([0.1, 0.2, 0.4], 0.4, 2.0),
        ([0.1, 0.2, 0.4], 0.05, 0.0),
        ([0.1, 0.3, 0.2, 0.5], 0.25, 0.75),  # the first crossing, of which the curve falls back
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
    assert median([10.0, None, 30.0]).value == 30.0  # without it the median would be 20
    assert (median([10.0, None, 30.0]).reached, median([10.0, None, 30.0]).n) == (2, 3)
    assert median([10.0, None]).value is None
    assert median([None, None, 5.0]).value is None
    assert median([10.0, 20.0]).value == 15.0
    assert median([]) == median([])
    assert (median([]).value, median([]).n) == (None, 0)


def test_mean_of_what_is_there() -> None:
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean([]))
