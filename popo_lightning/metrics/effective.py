"""Self-normalized importance weights of a problem's responses, and how many responses they are worth."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_EFFECTIVE = 2.0
"""Minimum number of effective responses of a problem. With fewer, its estimate is about one response's reward."""

MIN_COVERED = 0.5
"""Minimum mean weight of a problem's responses. Below it they lack most of what the target would write."""

LARGEST_LOG = 50.0  # larger log-weights carry no further information
ROUNDING = 1e-9

MAX_UNUSABLE = 0.5
"""Maximum share of problems below either minimum. With more, nothing is estimated."""


def normalized(log_weights: Floats) -> Floats:
    """Returns (N,) weights that sum to 1, from their logarithms, without overflow.

    Args:
        log_weights: (N,) logarithms, with N at least 1.
    """
    weights: Floats = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def effective_responses(log_weights: Floats) -> float:
    """Returns (sum w)^2 / sum w^2, from 1 to N: how many responses of the target policy these are worth.

    Args:
        log_weights: (N,) log(pi_target / pi_behave) of whole responses.
    """
    return float(1 / np.square(normalized(log_weights)).sum())


def usable(log_weights: Floats) -> bool:
    """Returns whether responses tell about the target policy.

    At least 2 must be effective, and their mean weight, which is 1 in expectation, must be at least one half. The
    second condition catches what the first cannot: responses whose weights are all alike and all small.

    Args:
        log_weights: (N,) log(pi_target / pi_behave) of whole responses.
    """
    covered = float(np.exp(np.minimum(log_weights, LARGEST_LOG)).mean())
    return effective_responses(log_weights) >= MIN_EFFECTIVE - ROUNDING and covered >= MIN_COVERED


def too_few(usable_problems: int, problems: int) -> bool:
    """Returns whether more than half of the problems are not usable."""
    return problems == 0 or problems - usable_problems > MAX_UNUSABLE * problems
