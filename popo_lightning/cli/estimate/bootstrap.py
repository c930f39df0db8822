"""Intervals of a mean over problems by the bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from popo_lightning.metrics.effective import Floats

AT_A_TIME = 100  # resamples in memory at a time
RESAMPLES = 2000
COVERED = 0.95


@dataclass(frozen=True)
class Estimated:
    """A number with its interval.

    Args:
        value: The estimate.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
    """

    value: float
    low: float
    high: float


def mean_over_problems(values: Floats, seed: int = 0, resamples: int = RESAMPLES) -> Estimated:
    """Mean of one number per problem, with the percentile bootstrap's 95% interval.

    Problems are drawn with replacement, so the interval is for other problems of the same kind: it covers the noise of
    each problem's own estimate and the differences between problems.

    Args:
        values: (P,) numbers, one per problem, with P at least 1.
        seed: Seed of the draws.
        resamples: Number of bootstrap samples, in hundreds.
    """
    if not np.isfinite(values).all():
        return Estimated(float("nan"), float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[random.integers(0, len(values), (AT_A_TIME, len(values)))].mean(1)
            for _ in range(resamples // AT_A_TIME)
        ]
    )
    low, high = np.quantile(means, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return Estimated(float(values.mean()), float(low), float(high))
