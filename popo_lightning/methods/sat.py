"""SAT (arXiv 2607.18722): a clip that is narrower for the tokens farthest from the policy that sampled them."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor

from popo_lightning.core.bounds import above, at_least, between, one_of
from popo_lightning.objectives.inputs import (
    LOG_RATIO_BOUND,
    MinibatchTokens,
    ObjectiveInputs,
    log_ratio,
    sampled_logp,
    sampled_tokens,
)
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, checked_dual_clip, clipped_surrogate


def tail_cut(staleness: Tensor, quantile: float) -> float:
    """Returns the smallest of the numbers that at least a fraction `quantile` of them does not exceed; 0 without any.

    Args:
        staleness: (N,) numbers.
        quantile: Fraction in (0, 1).
    """
    if not len(staleness):
        return 0.0
    place = math.ceil(quantile * len(staleness) - 1e-9) - 1  # 0.9 * 10 may round up
    return float(staleness.sort().values[max(place, 0)])


def contraction(staleness: Tensor, cut: float, exponent: float) -> Tensor:
    """Returns the factor of a token's clip range: 1 up to the cut, then Hill's 1 / (1 + (staleness / cut)^exponent).

    Args:
        staleness: Tensor of any shape, with values of at least 0.
        cut: Staleness above which the tail begins. 0 makes all factors 1, because most tokens have not moved.
        exponent: Steepness of the decay.
    """
    if not cut:
        return torch.ones_like(staleness)
    return torch.where(staleness > cut, 1 / (1 + (staleness / cut) ** exponent), 1.0)


class SAT(TrustRegion):
    """Staleness-adaptive trust region: contracts PPO's clip for the tail of stale tokens (arXiv 2607.18722).

    A token's staleness is |log pi_policy / pi_behave|, detached. The cut q is its quantile over the minibatch. Tokens
    up to q have PPO's bounds; above q the distance of the bounds from 1 is multiplied by `contraction`. Only the end on
    the advantage's side ever binds, so outward moves stop earlier and moves back to 1 are as free as before. The region
    lies within PPO's for every token. Stored: the behave log-probs. Extra passes: one forward pass per minibatch. The
    log has stale_cut (q), stale_share (tokens above it), and the mean and the minimum of the factors.

    Inferred: only a summary of the paper could be read. It has the quantile of 0.90, Hill's kernel of exponent 2,
    bounds of 0.2 and the ratio to behave. It lacks the kernel's formula; this is Hill's function with q as midpoint.

    Deviations: q is taken over the whole minibatch of all ranks, not over a micro-batch. On fresh rows behave is prox,
    so the engine's rounding does not count as staleness.

    Args:
        clip_low: Ratios below 1 - clip_low give no further gain, for tokens that are not stale.
        clip_high: Ratios above 1 + clip_high give no further gain, for tokens that are not stale.
        quantile: Share of a minibatch's tokens that keep the whole range.
        exponent: How fast the range shrinks beyond the quantile; 0 halves it for the whole tail.
        dual_clip: Upper bound of the ratio for negative advantages; null for none.
        center: Center of the ratio. behave is the paper's and needs behavior weight NoCorrection. prox needs a
            behavior weight, and makes this the trust region of decoupled PPO; staleness is still relative to behave.
    """

    needs_minibatch_tokens = True

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        quantile: float = 0.9,
        exponent: float = 2.0,
        dual_clip: float | None = None,
        center: Literal["prox", "behave"] = "prox",
    ) -> None:
        one_of("SAT.center", center, ("prox", "behave"))
        self.clip_low = above("SAT.clip_low", clip_low, 0, "0.2")
        self.clip_high = above("SAT.clip_high", clip_high, 0, "0.2")
        self.quantile = between("SAT.quantile", quantile, 0, 1, ", such as 0.9")
        self.exponent = at_least("SAT.exponent", exponent, 0, ", such as 2.0")
        self.dual_clip = checked_dual_clip("SAT", dual_clip)
        self.includes_is_weight = center == "behave"
        self.cut: float | None = None  # set for one minibatch
        self.found: dict[str, float] = {}

    def for_minibatch(self, tokens: MinibatchTokens) -> TrustRegion:
        """Returns the region with the cut of these tokens."""
        staleness = (tokens.logp - sampled_tokens(tokens)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).abs()
        region = copy.copy(self)
        region.needs_minibatch_tokens = False
        region.cut = tail_cut(staleness, self.quantile)
        factors = contraction(staleness, region.cut, self.exponent)
        region.found = {"stale_cut": region.cut}
        if len(factors):
            stale = (factors < 1).double().mean()
            numbers = {"stale_share": stale, "factor_mean": factors.double().mean(), "factor_min": factors.min()}
            region.found |= {name: float(number) for name, number in numbers.items()}
        return region

    def report(self) -> dict[str, float]:
        """Returns the cut, the share of stale tokens, and the mean and minimum factor."""
        return self.found

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Applies `clipped_surrogate` with each token's bounds."""
        if self.cut is None:
            raise RuntimeError("SAT's cut is that of a minibatch; call for_minibatch first.")
        mask, behave = rows.mask.bool(), sampled_logp(rows)
        factor = contraction(log_ratio(rows.logp.detach(), behave, mask).abs(), self.cut, self.exponent)
        center = behave if self.includes_is_weight else rows.prox_logp.detach()
        bounds = factor * self.clip_low, factor * self.clip_high, self.dual_clip
        return clipped_surrogate(log_ratio(rows.logp, center, mask).exp(), rows.advantages, mask, *bounds)
