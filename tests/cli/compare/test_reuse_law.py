"""The law of responses needed by reuse: it is recovered from its own numbers, and invalid data give no law."""

from __future__ import annotations

import math

import numpy as np
import pytest

from popo_lightning.cli.compare.reuse_law import ReuseLaw, cheapest, fitted, forecast, needed_responses, rising

LAW = ReuseLaw(floor=0.35, slope=0.6**0.7, exponent=0.7)
REUSE = [0.5, 1.0, 2.0, 4.0, 8.0]


def test_a_law_by_hand() -> None:
    """(4 / 1)^-0.5 = 1/2."""
    assert ReuseLaw(100.0, 1.0, 0.5).responses(4.0) == pytest.approx(100.5)
    assert LAW.responses(0.6) == pytest.approx(1.35)


@pytest.mark.parametrize("unit", [1.0, 20_000.0])
@pytest.mark.parametrize("reuse", [REUSE, REUSE[1:4]])
def test_the_numbers_of_a_law_are_recovered(reuse: list[float], unit: float) -> None:
    """Without noise, five settings and the minimum of three recover the law, in units of any size."""
    law = fitted(reuse, [unit * LAW.responses(sigma) for sigma in reuse])
    assert law is not None
    assert law.exponent == pytest.approx(0.7, rel=1e-6) and law.floor == pytest.approx(0.35 * unit, rel=1e-6)
    assert law.responses(16.0) == pytest.approx(unit * LAW.responses(16.0), rel=1e-7)
    assert law.slope == pytest.approx(0.6**0.7 * unit, rel=1e-6)


def test_noise_leaves_the_truth_within_the_interval() -> None:
    """The noise is 10% on each of 10 seeds. Of 20 such data sets, at least 17 intervals contain the true value."""
    draw, held = np.random.default_rng(3), 0
    for _ in range(20):
        needed = {sigma: LAW.responses(sigma) * (1 + 0.1 * draw.standard_normal(10)) for sigma in REUSE}
        found = forecast(needed, lambda law: law.responses(4.0), resamples=60)
        assert found.low < found.value < found.high
        held += found.low <= LAW.responses(4.0) <= found.high
    assert held >= 17


def test_reuse_that_saves_nothing_has_no_law() -> None:
    assert fitted([1.0, 2.0, 4.0], [10.0, 12.0, 15.0]) is None
    found = forecast({1.0: [10.0, 11.0], 2.0: [20.0, 21.0], 4.0: [30.0, 31.0]}, lambda law: law.responses(8.0))
    assert found.law is None and math.isnan(found.value) and found.failed == 1.0


def test_small_savings_of_many_responses_are_a_law() -> None:
    """The exponent is near 0, where the paper's scale is about 1e350."""
    law = fitted([1.0, 2.0, 4.0], [2.0e6, 1.99e6, 1.95e6])
    assert law is not None and law.responses(4.0) == pytest.approx(1.95e6, rel=0.01)


def test_two_settings_are_too_few() -> None:
    with pytest.raises(ValueError, match="three different reuses"):
        fitted([1.0, 1.0, 2.0], [3.0, 3.0, 2.0])


def test_a_floor_is_never_below_zero() -> None:
    """The responses fall faster than any power, so the nearest law has floor 0."""
    law = fitted([1.0, 2.0, 4.0], [1000.0, 900.0, 1.0])
    assert law is not None and law.floor == 0.0


def test_a_curve_with_a_dip_comes_to_a_level_once() -> None:
    curve = [0.1, 0.3, 0.2, 0.4]
    assert rising(curve) == pytest.approx([0.1, 0.25, 0.25, 0.4])
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0] and rising([]) == []
    responses = [0.0, 100.0, 200.0, 300.0]
    assert needed_responses(curve, responses, 0.25) == pytest.approx(100.0)
    assert needed_responses(curve, responses, 0.325) == pytest.approx(250.0)  # halfway from 0.25 to 0.4
    assert needed_responses(curve, responses, 0.5) is None, "a level that is never reached is not extrapolated"


def test_prices_decide_the_setting() -> None:
    """More reuse always pays for floor 0 and exponent 1, where cost is g / sigma + t, but not for exponent below 1.

    For D = sigma^-1/2 the cost g sigma^-1/2 + t sigma^1/2 is lowest at sigma = g / t.
    """
    assert cheapest(ReuseLaw(0.0, 1.0, 1.0), REUSE, 1.0, 1.0) == pytest.approx(8.0)
    root = ReuseLaw(0.0, 1.0, 0.5)
    assert cheapest(root, REUSE, 3.0, 1.0) == pytest.approx(3.0, rel=0.01)
    assert cheapest(root, REUSE, 1.0, 100.0) == pytest.approx(0.5), "not below what was run"
    assert cheapest(root, REUSE, 100.0, 1.0) == pytest.approx(8.0), "not above it"
