"""Estimates a behavior's effect on the reward with a randomized hint (Xu et al., 2212.14468, for one step).

Policies choose a behavior where it seems to be needed, so rewards with and without it do not show its effect: hard
problems provoke long answers. A hint that is put into the prompt at random (Z) changes the behavior (A) for no such
reason. If it affects the reward (R) through the behavior alone, the Wald ratio

    (E[R | Z=1] - E[R | Z=0]) / (p11 - p10),    p1z = P(A=1 | Z=z)

is the effect: of all responses if it is the same for all, otherwise of those that the hint changes. The mean reward of
a policy that acts with probability pi is sum over z of c(z) E[R | Z=z], with c by :func:`instrument_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from popo_lightning.cli.estimate.bootstrap import Estimated
from popo_lightning.core.errors import SettingError
from popo_lightning.metrics.effective import Floats

MIN_DIFFERENCE = 0.05  # smallest difference between p11 and p10
MIN_F = 10.0  # smallest F of the first stage (Staiger and Stock, 1997)
NORMAL = 1.959963984540054  # standard errors on either side that hold 95% of a normal distribution


@dataclass(frozen=True)
class Effect:
    """Effect of a behavior.

    Args:
        wald: Instrumental-variable estimate of the effect.
        naive: Mean reward with the behavior minus the mean reward without it.
        always: Mean reward of a policy that always acts.
        never: Mean reward of a policy that never acts.
        p11: Fraction of the responses with the hint that act.
        p10: Fraction of the responses without the hint that act.
        responses: Number of responses.
        problems: Number of problems; responses to one problem count as dependent.
    """

    wald: Estimated
    naive: Estimated
    always: Estimated
    never: Estimated
    p11: float
    p10: float
    responses: int
    problems: int


def instrument_weights(acts: float, p11: float, p10: float) -> tuple[float, float]:
    """(c(0), c(1)), the weights of the hint's two arms for which sum over z of c(z) p1z = acts.

    Args:
        acts: Fraction of responses that act under the policy in question.
        p11: Fraction that acts with the hint under the logged policy.
        p10: Fraction that acts without the hint under the logged policy.
    """
    c1 = (acts - p10) / (p11 - p10)
    return 1 - c1, c1


def effect(hinted: NDArray[np.bool_], acts: NDArray[np.bool_], rewards: Floats, problems: Sequence[object]) -> Effect:
    """The effect of a behavior, with intervals that treat responses to one problem as dependent.

    Intervals are value -+ 1.96 standard errors, from influence functions summed over problems.

    Args:
        hinted: (N,) whether the prompt had the hint.
        acts: (N,) whether the response acts.
        rewards: (N,) rewards.
        problems: Name of each response's problem.

    Raises:
        SettingError: The hint is the same in all rows, or it changes the behavior too little.
    """
    z, a = hinted.astype(float), acts.astype(float)
    if z.min() == z.max():
        raise SettingError("the instrument is the same in all rows, which tells nothing; randomize it")
    kinds = np.unique(np.asarray(problems, dtype=str), return_inverse=True)[1]
    (r0, of_r0), (r1, of_r1) = _arm_means(z, rewards)
    (p10, of_p10), (p11, of_p11) = _arm_means(z, a)
    if abs(p11 - p10) < MIN_DIFFERENCE:
        raise _weak(p11, p10, f"by less than {MIN_DIFFERENCE}")
    if ((p11 - p10) / _standard_error(of_p11 - of_p10, kinds)) ** 2 < MIN_F:
        raise _weak(p11, p10, f"which {len(z)} responses do not tell from no difference (F is below {MIN_F:g})")
    ratio = (r1 - r0) / (p11 - p10)
    residual0, residual1 = of_r0 - ratio * of_p10, of_r1 - ratio * of_p11
    of_ratio = (residual1 - residual0) / (p11 - p10)

    def policy(does: float) -> Estimated:
        c0, c1 = instrument_weights(does, p11, p10)
        return _estimated(c0 * r0 + c1 * r1, residual0 + (does - p10) * of_ratio, kinds)

    (without, of_without), (acting, of_acting) = _arm_means(a, rewards)
    return Effect(
        wald=_estimated(ratio, of_ratio, kinds),
        naive=_estimated(acting - without, of_acting - of_without, kinds),
        always=policy(1.0),
        never=policy(0.0),
        p11=p11,
        p10=p10,
        responses=len(z),
        problems=int(kinds.max()) + 1,
    )


def _arm_means(arms: Floats, values: Floats) -> list[tuple[float, Floats]]:
    """Means of the rows with 0 and with 1 in `arms`, each with the influence of each row on it."""
    found = []
    for inside in (1 - arms, arms):
        mean = float(inside @ values / inside.sum()) if inside.sum() else float("nan")
        found.append((mean, inside / max(inside.mean(), 1e-300) * (values - mean)))
    return found


def _standard_error(influence: Floats, kinds: NDArray[np.int64]) -> float:
    """Standard error of a mean, from influences that are summed over each problem."""
    sums = np.bincount(kinds, weights=influence)
    return float(max(np.sqrt(np.square(sums).sum()) / len(influence), 1e-300))


def _estimated(value: float, influence: Floats, kinds: NDArray[np.int64]) -> Estimated:
    half = NORMAL * _standard_error(influence, kinds)
    return Estimated(value, value - half, value + half)


def _weak(p11: float, p10: float, how: str) -> SettingError:
    return SettingError(
        f"the instrument is weak: the behavior occurs in {p11:.3f} of the responses with it and in {p10:.3f} without, "
        f"{how}; use a stronger hint, another --action, or more responses"
    )
