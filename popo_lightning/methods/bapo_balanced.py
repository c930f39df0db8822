"""BAPO (arXiv 2510.18927): clip bounds wide enough that good tokens have their share of the loss."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from popo_lightning.core.bounds import above, one_of, within
from popo_lightning.core.errors import SettingError
from popo_lightning.objectives.behave_clip import FixedBehaveClip, sampled_tokens
from popo_lightning.objectives.inputs import LOG_RATIO_BOUND, MinibatchTokens, ObjectiveInputs
from popo_lightning.objectives.trust_regions import (
    FixedClip,
    TrustRegion,
    TrustRegionOutput,
    checked_dual_clip,
)


def positive_share(ratio: Tensor, advantages: Tensor, low: float, high: float) -> float:
    """Share of tokens with A > 0 in what a minibatch contributes to the loss under these bounds.

    Contribution of A > 0: sum of min(ratio, high) A; of A < 0: sum of max(ratio, low) |A|. 1 where nothing is negative.

    Args:
        ratio: (N,), policy over centre.
        advantages: (N,).
        low: Lower bound of the ratio.
        high: Upper bound of the ratio.
    """
    positive = float((ratio.clamp(max=high) * advantages.clamp(min=0)).double().sum())
    negative = float((ratio.clamp(min=low) * -advantages.clamp(max=0)).double().sum())
    return positive / (positive + negative) if negative > 0 else 1.0


def steps(start: float, end: float, step: float) -> list[float]:
    """From start to end by step, the end included even if it is no whole step away."""
    return [*(start + step * k for k in range(math.ceil((end - start) / step - 1e-9))), end]


class BalancedClip(TrustRegion):
    """BAPO's adaptive bounds: wide enough that good tokens have their share of the loss (arXiv 2510.18927).

    Stale data let tokens with A < 0 dominate. For each minibatch the bounds start at (low_from, high_from). While the
    `positive_share` is below its target, first the lower bound rises to low_to, which takes negative tokens out, then
    the upper one to high_to, which lets positive tokens in. Then PPO's clip with these bounds, and a dual clip. One
    forward pass more a minibatch; the log has the bounds and the share. Not the "Buffer Matters" method of the same
    name.

    Deviations: bounds are found for the whole minibatch; the official code takes each micro-batch. Shares are not
    weighted by the behaviour weight, nor are they there. The upper limit is the paper's 3, configs of the official code
    have 2 (and 0.8 for the lower).

    Args:
        low_from: Lower bound of the ratio at first.
        low_to: Lower bound of the ratio at most.
        high_from: Upper bound of the ratio at first.
        high_to: Upper bound of the ratio at most.
        step: By how much a bound is moved at a time.
        target: Share of the contributions that is to come from A > 0.
        dual_clip: Bound of the ratio where the advantage is negative, null for none.
        center: behave, as in the paper, with One for a weight; or prox, with a behaviour weight, which makes BAPO's
            bounds the trust region of decoupled PPO.
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
        if not high_from <= high_to < math.inf:
            raise SettingError(
                f"BalancedClip.high_to is {high_to}; it must be a finite number of at least high_from, such as 3.0."
            )
        above("BalancedClip.step", step, 0, "0.05")
        self.target = within("BalancedClip.target", target, 0, 1, "0.5")
        self.dual_clip = checked_dual_clip("BalancedClip", dual_clip)
        self.includes_is_weight = center == "behave"
        lower = [(low, high_from) for low in steps(low_from, low_to, step)]
        self.bounds = lower + [(low_to, high) for high in steps(high_from, high_to, step)[1:]]

    def for_minibatch(self, tokens: MinibatchTokens) -> TrustRegion:
        """Give the clip at the first bounds that reach the target, or else at the widest."""
        center = sampled_tokens(tokens) if self.includes_is_weight else tokens.prox_logp
        logs = (tokens.logp - center).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        ratio = logs.exp()
        for low, high in self.bounds:
            share = positive_share(ratio, tokens.advantages, low, high)
            if share >= self.target:
                break
        clip = FixedBehaveClip if self.includes_is_weight else FixedClip
        return clip(1 - low, high - 1, self.dual_clip, {"positive_share": share})

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Refuse: the bounds come from the minibatch."""
        raise RuntimeError("BalancedClip's bounds are those of a minibatch; call for_minibatch first.")
