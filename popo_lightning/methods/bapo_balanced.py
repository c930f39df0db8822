"""BAPO (arXiv 2510.18927): adaptive clip bounds that give positive-advantage tokens their share of the loss."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from popo_lightning.core.bounds import above, at_least, one_of, within
from popo_lightning.objectives.inputs import LOG_RATIO_BOUND, MinibatchTokens, ObjectiveInputs, sampled_tokens
from popo_lightning.objectives.trust_regions import FixedClip, TrustRegion, TrustRegionOutput, checked_dual_clip


def positive_share(ratio: Tensor, advantages: Tensor, low: float, high: float) -> float:
    """Returns the share of tokens with A > 0 in a minibatch's contribution to the loss under these bounds.

    Tokens with A > 0 contribute sum of min(ratio, high) A; those with A < 0 sum of max(ratio, low) |A|. The share is 1
    if no token is negative.

    Args:
        ratio: (N,) pi_policy / pi_center of each token.
        advantages: (N,) advantage of each token.
        low: Lower bound of the ratio.
        high: Upper bound of the ratio.
    """
    positive = float((ratio.clamp(max=high) * advantages.clamp(min=0)).double().sum())
    negative = float((ratio.clamp(min=low) * -advantages.clamp(max=0)).double().sum())
    return positive / (positive + negative) if negative > 0 else 1.0


def steps(start: float, end: float, step: float) -> list[float]:
    """Returns the numbers from start to end by step. The end is included even if the last step is shorter."""
    return [*(start + step * k for k in range(math.ceil((end - start) / step - 1e-9))), end]


class BalancedClip(TrustRegion):
    """BAPO's adaptive clip bounds, which give positive-advantage tokens their share of the loss (arXiv 2510.18927).

    With stale data, tokens with A < 0 dominate. For each minibatch the bounds start at (low_from, high_from). While
    `positive_share` is below its target, the lower bound first rises to low_to, which removes negative tokens. Then the
    upper bound rises to high_to, which admits positive tokens. PPO's clip with these bounds and a dual clip follows.
    Extra passes: one forward pass per minibatch. The log has the bounds and the share. This is not the "Buffer Matters"
    method of the same name.

    Deviations: the bounds are found for the whole minibatch; the official code finds them for each micro-batch. The
    shares are not weighted by the behavior weight, as in the official code. The upper limit is the paper's 3;
    configurations of the official code have 2 (and 0.8 for the lower bound).

    Args:
        low_from: Initial lower bound of the ratio.
        low_to: Maximum of the lower bound.
        high_from: Initial upper bound of the ratio.
        high_to: Maximum of the upper bound.
        step: Increment of a bound.
        target: Target share of the contributions from tokens with A > 0.
        dual_clip: Upper bound of the ratio for negative advantages; null for none.
        center: Center of the ratio. behave is the paper's and needs behavior weight NoCorrection. prox needs a
            behavior weight, and makes BAPO's bounds the trust region of decoupled PPO.
    """

    needs_minibatch_tokens = True

    def __init__(
        self,
        low_from: float = 0.6,
        low_to: float = 0.9,
        high_from: float = 1.2,
        high_to: float = 3.0,
        step: float = 0.05,
        target: float = 0.5,
        dual_clip: float | None = 3.0,
        center: Literal["prox", "behave"] = "prox",
    ) -> None:
        one_of("BalancedClip.center", center, ("prox", "behave"))
        within("BalancedClip.low_to", low_to, 0, 1, "0.9")
        within("BalancedClip.low_from", low_from, 0, low_to, "0.6, and not above low_to")
        above("BalancedClip.high_from", high_from, 1, "1.2")
        at_least("BalancedClip.high_to", high_to, high_from, " (high_from), such as 3.0")
        above("BalancedClip.step", step, 0, "0.05")
        self.target = within("BalancedClip.target", target, 0, 1, "0.5")
        self.dual_clip = checked_dual_clip("BalancedClip", dual_clip)
        self.includes_is_weight = center == "behave"
        lower = [(low, high_from) for low in steps(low_from, low_to, step)]
        self.bounds = lower + [(low_to, high) for high in steps(high_from, high_to, step)[1:]]

    def for_minibatch(self, tokens: MinibatchTokens) -> TrustRegion:
        """Returns the clip with the first bounds that reach the target, or with the last bounds if none do."""
        center = sampled_tokens(tokens) if self.includes_is_weight else tokens.prox_logp
        logs = (tokens.logp - center).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        ratio = logs.exp()
        for low, high in self.bounds:
            share = positive_share(ratio, tokens.advantages, low, high)
            if share >= self.target:
                break
        return FixedClip(1 - low, high - 1, self.dual_clip, {"positive_share": share}, self.includes_is_weight)

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Refuses, because the bounds depend on the minibatch."""
        raise RuntimeError("BalancedClip's bounds are those of a minibatch; call for_minibatch first.")
