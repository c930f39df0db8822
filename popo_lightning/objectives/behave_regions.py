"""Trust regions around the policy that sampled: their ratio pi_policy / pi_behave has the behaviour weight in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from popo_lightning.objectives.inputs import LOG_RATIO_BOUND, MinibatchTokens, ObjectiveInputs
from popo_lightning.objectives.sequence_regions import sequence_log_ratio
from popo_lightning.objectives.settings import above, at_least, within
from popo_lightning.objectives.trust_regions import FoundClip, PPOClip, TrustRegion, TrustRegionOutput


def sampled_logp(rows: ObjectiveInputs) -> Tensor:
    """Log-probs (R, T) under the policy that sampled: behave's on replayed rows, prox's on fresh ones.

    Fresh rows were sampled by prox; the engine's own log-probs of them differ from prox's by rounding, which must not
    fill the trust region. As for behaviour weights.
    """
    return torch.where(rows.fresh.bool().unsqueeze(-1), rows.prox_logp, rows.behave_logp).detach()


class BehaveAligned(PPOClip):
    """PPO's clip of pi_policy / pi_behave around 1: POPO's ablation that aligns fully with behave (arXiv 2606.01281).

    The same as RePO's (arXiv 2506.09340) and TRL's replayed loss. On stale rows the ratio starts away from 1, often
    outside the bounds already, and then such tokens teach nothing or are not held back. `behave_weight` must be One.
    Needs the stored behave log-probs, no passes. On fresh rows it is PPOClip. Inferred: the paper names the ablation
    and gives no formula.

    Args:
        clip_low: The ratio gives no more gain below 1 - clip_low.
        clip_high: The ratio gives no more gain above 1 + clip_high.
        dual_clip: Bound of the ratio where the advantage is negative, null for none.
    """

    folds_weight = True

    def centre(self, rows: ObjectiveInputs) -> Tensor:
        """Give `sampled_logp` of the rows."""
        return sampled_logp(rows)


class FilteredBehaveAligned(BehaveAligned):
    """PPO's clip of pi_policy / pi_behave around 1, without the responses of which the policy has moved away.

    FreshPER's loss (arXiv 2604.16918; Vision-CAIR/Freshness-Aware-PER). A replayed response teaches nothing, as a
    whole, if the geometric mean of its tokens' pi_prox / pi_behave is above `greatest_ratio`; the clip is that of
    `BehaveAligned`. `behave_weight` must be One. Needs the stored behave log-probs, and prox, no further passes.
    `clipped` counts the tokens of rejected responses.

    Deviation: the source draws other responses in the place of rejected ones, before it trains; here they leave a gap,
    and still count in the denominator.

    Args:
        clip_low: The ratio gives no more gain below 1 - clip_low.
        clip_high: The ratio gives no more gain above 1 + clip_high.
        dual_clip: Bound of the ratio where the advantage is negative, null for none.
        greatest_ratio: Geometric mean above which a replayed response is rejected.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = 10.0,
        greatest_ratio: float = 3.0,
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip)
        self.greatest_ratio = above("FilteredBehaveAligned.greatest_ratio", greatest_ratio, 1, "3.0")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Apply `ppo_clip` around `sampled_logp` to the responses that are kept; the others have loss 0."""
        found = super().__call__(rows, weight)
        log_mean = sequence_log_ratio(rows.prox_logp.detach(), sampled_logp(rows), rows.mask)
        rejected = (log_mean > math.log(self.greatest_ratio)) & rows.mask.bool()
        return TrustRegionOutput(torch.where(rejected, 0.0, found.loss), found.ratio, found.clipped | rejected)


class FoundBehaveClip(FoundClip):
    """A clip around behave with bounds that were found for one minibatch."""

    folds_weight = True

    def centre(self, rows: ObjectiveInputs) -> Tensor:
        """Give `sampled_logp`."""
        return sampled_logp(rows)


def sampled_tokens(tokens: MinibatchTokens) -> Tensor:
    """As `sampled_logp`, (N,)."""
    return torch.where(tokens.fresh.bool(), tokens.prox_logp, tokens.behave_logp)


def second_moment_cut(squares: Tensor, budget: float) -> float:
    """The greatest |log-ratio| among the tokens at which cutting all of them keeps their mean square within the budget.

    Sorted ascending v_1 <= ... <= v_n: the greatest v_k with v_1 + ... + v_k + (n - k) v_k < n * budget; its root. As
    the official code does, one of the values is taken, not the point between two of them where the budget is met.

    Args:
        squares: (N,) squared log-ratios.
        budget: Bound of their mean.

    Returns:
        The cut; infinite if their mean is within the budget already, 0 if even the smallest is too much.
    """
    if not len(squares) or float(squares.double().mean()) <= budget:
        return math.inf
    ordered = squares.double().sort().values
    above_each = torch.arange(len(ordered) - 1, -1, -1, device=ordered.device)
    cut_sums = ordered.cumsum(0) + above_each * ordered
    kept = int((cut_sums < budget * len(ordered)).sum())
    return math.sqrt(float(ordered[kept - 1])) if kept else 0.0


def harmful(log_ratios: Tensor, advantages: Tensor) -> Tensor:
    """Tokens that have gone on in the direction they are pushed to: A > 0 and ratio > 1, or A < 0 and ratio < 1.

    (N,) and (N,) to (N,) bool. Only these can be clipped by PPO's rule.
    """
    return advantages * log_ratios > 0


class M2PO(TrustRegion):
    """Second-moment trust policy optimization: clips no more than stale data need (arXiv 2510.01161, official code).

    M2 is the mean of (log pi_policy / pi_behave)^2 over the harmful tokens of a minibatch (A > 0 and ratio > 1, or
    A < 0 and ratio < 1). Up to the budget nothing is clipped. Above it, tau is the cut of |log ratio| that brings M2
    back, and the minibatch is trained with PPO's clip at exp(-tau) and exp(tau), but never narrower than the floors.
    The ratio is to behave, so `behave_weight` must be One. Needs the stored behave log-probs and one forward pass more
    a minibatch. The log has m2, m2_cut and the bounds.

    Deviations: M2 is over the whole minibatch; the official code takes each micro-batch, which makes the loss depend on
    how rows are split. The paper's equation masks the largest tokens until M2 over all is within the budget; the code's
    form is followed here. On fresh rows behave is prox.

    Args:
        budget: Bound of the second moment.
        least_clip_low: The lower bound is never above 1 - least_clip_low.
        least_clip_high: The upper bound is never below 1 + least_clip_high.
    """

    needs_minibatch_tokens = True
    folds_weight = True

    def __init__(self, budget: float = 0.04, least_clip_low: float = 0.3, least_clip_high: float = 0.5) -> None:
        self.budget = above("M2PO.budget", budget, 0, "0.04")
        self.least_clip_low = within("M2PO.least_clip_low", least_clip_low, 0, 1, "0.3")
        self.least_clip_high = at_least("M2PO.least_clip_high", least_clip_high, 0, ", such as 0.5")

    def for_minibatch(self, tokens: MinibatchTokens) -> TrustRegion:
        """Give the clip at the cut found in these tokens."""
        logs = (tokens.logp - sampled_tokens(tokens)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        squares = logs[harmful(logs, tokens.advantages)].square()
        cut = second_moment_cut(squares, self.budget)
        m2 = float(squares.double().mean()) if len(squares) else 0.0
        low = max(1 - math.exp(-cut), self.least_clip_low)
        high = max(math.expm1(cut) if cut < math.inf else math.inf, self.least_clip_high)
        return FoundBehaveClip(low, high, None, {"m2": m2, "m2_cut": cut})

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Refuse: the bounds come from the minibatch."""
        raise RuntimeError("M2PO's bounds are those of a minibatch; call for_minibatch first.")
