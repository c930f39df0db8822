"""M2PO (arXiv 2510.01161): a clip no narrower than the second moment of stale log-ratios requires."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from popo_lightning.core.bounds import above, at_least, within
from popo_lightning.objectives.inputs import LOG_RATIO_BOUND, MinibatchTokens, ObjectiveInputs, sampled_tokens
from popo_lightning.objectives.trust_regions import FixedClip, TrustRegion, TrustRegionOutput


def second_moment_cut(squares: Tensor, budget: float) -> float:
    """Finds the largest |log-ratio| of a token at which clamping all of them keeps their mean square in the budget.

    With the squares sorted ascending, v_1 <= ... <= v_n, it is the root of the largest v_k with
    v_1 + ... + v_k + (n - k) v_k < n * budget. As in the official code, the cut is one of the values, not the point
    between two of them where the budget is met exactly.

    Args:
        squares: (N,) squared log-ratios.
        budget: Upper bound of the mean square.

    Returns:
        The cut. It is infinite if the mean is already within the budget, and 0 if even the smallest value exceeds it.
    """
    if not len(squares) or float(squares.double().mean()) <= budget:
        return math.inf
    ordered = squares.double().sort().values
    above_each = torch.arange(len(ordered) - 1, -1, -1, device=ordered.device)
    cut_sums = ordered.cumsum(0) + above_each * ordered
    kept = int((cut_sums < budget * len(ordered)).sum())
    return math.sqrt(float(ordered[kept - 1])) if kept else 0.0


def harmful(log_ratios: Tensor, advantages: Tensor) -> Tensor:
    """Marks tokens already past behave in the direction of their advantage: A > 0, ratio > 1 or A < 0, ratio < 1.

    Maps (N,) and (N,) to (N,) bool. PPO's rule can clip only these.
    """
    return advantages * log_ratios > 0


class M2PO(TrustRegion):
    """Second-moment trust policy optimization: clips no more than stale data need (arXiv 2510.01161, official code).

    M2 is the mean of (log pi_policy / pi_behave)^2 over the harmful tokens of a minibatch (A > 0 and ratio > 1, or A <
    0 and ratio < 1). Within the budget nothing is clipped. Above it, tau is the bound of |log ratio| that brings M2
    back to the budget, and the minibatch is trained with PPO's clip at exp(-tau) and exp(tau), but never narrower than
    the floors. The ratio is to behave, so `behave_weight` must be NoCorrection. It needs the stored behave log-probs.
    Extra passes: one forward pass per minibatch. The log has m2, m2_cut and the bounds.

    Deviations: M2 is over the whole minibatch; the official code computes it per micro-batch, which makes the loss
    depend on how rows are split. The paper's equation masks the largest tokens until M2 over all is within the budget;
    here the code's form is implemented. On fresh rows behave is prox.

    Args:
        budget: Maximum second moment.
        min_clip_low: The lower bound is never above 1 - min_clip_low.
        min_clip_high: The upper bound is never below 1 + min_clip_high.
    """

    needs_minibatch_tokens = True
    includes_is_weight = True

    def __init__(self, budget: float = 0.04, min_clip_low: float = 0.3, min_clip_high: float = 0.5) -> None:
        self.budget = above("M2PO.budget", budget, 0, "0.04")
        self.min_clip_low = within("M2PO.min_clip_low", min_clip_low, 0, 1, "0.3")
        self.min_clip_high = at_least("M2PO.min_clip_high", min_clip_high, 0, ", such as 0.5")

    def for_minibatch(self, tokens: MinibatchTokens) -> TrustRegion:
        """Returns the clip at the cut found in these tokens."""
        logs = (tokens.logp - sampled_tokens(tokens)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        squares = logs[harmful(logs, tokens.advantages)].square()
        cut = second_moment_cut(squares, self.budget)
        m2 = float(squares.double().mean()) if len(squares) else 0.0
        low = max(1 - math.exp(-cut), self.min_clip_low)
        high = max(math.expm1(cut) if cut < math.inf else math.inf, self.min_clip_high)
        return FixedClip(low, high, None, {"m2": m2, "m2_cut": cut}, around_behave=True)

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Refuses, because the bounds depend on the minibatch."""
        raise RuntimeError("M2PO's bounds are those of a minibatch; call for_minibatch first.")
