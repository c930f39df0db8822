"""How many responses a run must generate as a function of how often it trains on them. Pure functions of numbers.

The scaling law of value-based deep RL (arXiv 2502.04327, github.com/prestonfu/qscaled), applied to responses: the
reuse sigma, tokens trained on per token generated, replaces its updates per environment step. Deviation: the paper
tunes learning rate and batch size for each sigma; here a comparison leaves both as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from popo_lightning.cli.compare.statistics import at, reached_at

EXPONENTS = np.geomspace(0.02, 8.0, 241)
RESAMPLES = 200
COVERED = (0.025, 0.975)


@dataclass(frozen=True)
class ReuseLaw:
    """D(sigma) = floor + slope sigma^-exponent (2502.04327, section 4): responses needed to reach an accuracy.

    The paper writes (sigma / b)^-a for the second term; its b is slope^(1 / a), which a small exponent makes too large
    for a float.

    Args:
        floor: D_min, the limit of the responses for a large reuse.
        slope: Responses above the floor at a reuse of 1.
        exponent: a, above 0.
    """

    floor: float
    slope: float
    exponent: float

    def responses(self, reuse: float) -> float:
        """Responses needed at a reuse sigma."""
        return float(self.floor + self.slope * reuse**-self.exponent)


def fitted(reuse: Sequence[float], responses: Sequence[float]) -> ReuseLaw | None:
    """Fits the law by least squares, with floor >= 0 and exponent in [0.02, 8].

    For a given exponent the rest is linear least squares. The exponent is found on a grid that is refined around its
    best point. The paper also starts from a grid but continues with L-BFGS.

    Args:
        reuse: Sigma of each setting; at least three different values.
        responses: Responses that each setting needed, above 0.

    Returns:
        The law, or None if more reuse never saves responses, so that no such law holds.
    """
    sigma, needed = np.asarray(reuse, float), np.asarray(responses, float)
    if len(set(reuse)) < 3:
        raise ValueError(f"a law of three numbers needs three different reuses, got {sorted(set(reuse))}")
    grid = EXPONENTS
    for _ in range(8):
        best = int(np.argmin(_linear(sigma, needed, grid)[0]))
        grid = np.geomspace(grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)], 41)
    exponent = float(grid[len(grid) // 2])
    _, (floor,), (slope,) = (each.tolist() for each in _linear(sigma, needed, np.asarray([exponent])))
    return ReuseLaw(floor, slope, exponent) if slope > 1e-12 * needed.max() else None  # else reuse saves nothing


def _linear(sigma: np.ndarray, needed: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared error, floor and slope of needed = floor + slope sigma^-exponent, floor and slope >= 0; (E,) each.

    Args:
        sigma: Reuse of each setting, (n,).
        needed: Responses that each setting needed, (n,).
        exponents: Exponents to fit at once, (E,).
    """
    x = sigma ** -exponents[:, None]
    mean = x.mean(axis=1)
    centered = x - mean[:, None]
    slope = centered @ needed / (centered**2).sum(axis=1)
    floor = needed.mean() - slope * mean
    slope = np.where(floor < 0, x @ needed / (x**2).sum(axis=1), slope)
    floor = np.maximum(floor, 0.0)
    floor = np.where(slope < 0, needed.mean(), floor)
    slope = np.maximum(slope, 0.0)
    errors = ((floor[:, None] + slope[:, None] * x - needed) ** 2).sum(axis=1)
    return errors, floor, slope


def rising(values: Sequence[float]) -> list[float]:
    """The nearest nondecreasing curve (isotonic regression by pooling adjacent violators); it crosses a level once."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (above, n), (below, m) = pools[-2:]
            pools[-2:] = [((above * n + below * m) / (n + m), n + m)]
    return [value for value, count in pools for _ in range(count)]


def needed_responses(accuracies: Sequence[float], responses: Sequence[float], level: float) -> float | None:
    """Responses generated until a curve, made monotone, first reaches a level; None if it never does.

    Args:
        accuracies: Accuracy at each evaluation.
        responses: Responses generated before each evaluation.
        level: Accuracy to reach.
    """
    place = reached_at(rising(accuracies), level)
    return None if place is None else at(responses, place)


@dataclass(frozen=True)
class Forecast:
    """A number predicted by the law, with a bootstrap interval over seeds.

    Args:
        law: Law fitted to the means over seeds; None if none holds.
        low: 2.5% quantile of the number over resampled seeds.
        high: 97.5% quantile of the number over resampled seeds.
        value: The number, from `law`.
        failed: Fraction of the resamples in which no law holds.
    """

    law: ReuseLaw | None
    value: float
    low: float
    high: float
    failed: float


def forecast(
    needed: Mapping[float, Sequence[float]],
    number: Callable[[ReuseLaw], float],
    resamples: int = RESAMPLES,
) -> Forecast:
    """Predicts a number from the law, with a bootstrap interval over seeds.

    Args:
        needed: Responses that each seed needed, by reuse.
        number: Computes the number from a law, such as its responses at a reuse that was not run.
        resamples: Number of bootstrap samples; each draws seeds with replacement, separately for each reuse.
    """
    law = fitted(list(needed), [float(np.mean(values)) for values in needed.values()])
    draw = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        means = [float(np.mean(draw.choice(np.asarray(values), len(values)))) for values in needed.values()]
        if (resampled := fitted(list(needed), means)) is not None:
            found.append(number(resampled))
    low, high = np.quantile(found, COVERED) if found else (float("nan"),) * 2
    value = float("nan") if law is None else number(law)
    return Forecast(law, value, float(low), float(high), 1 - len(found) / resamples)


def cheapest(law: ReuseLaw, reuse: Sequence[float], generated: float, trained: float) -> float:
    """The reuse, within the range that was run, at which reaching the level is cheapest.

    Cost = D(sigma) (generated + trained sigma), in the unit of the two prices.

    Args:
        law: Law of responses needed.
        reuse: Reuses that were run.
        generated: Price of generating a response.
        trained: Price of training on a response once.
    """
    grid = np.geomspace(min(reuse), max(reuse), 400)
    return float(grid[np.argmin([law.responses(sigma) * (generated + trained * sigma) for sigma in grid])])
