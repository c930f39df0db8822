"""Trust regions whose ratio is a constant: REINFORCE's -c A log pi with a bounded or masked c (CISPO, RAPID, REC)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from popo_lightning.objectives.behave_regions import sampled_logp
from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio
from popo_lightning.objectives.sequence_regions import sequence_log_ratio
from popo_lightning.objectives.settings import above, one_of, within
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, score_loss

RECMask = Literal["none", "one-side", "two-side", "ring"]


def capped_score_loss(
    logp: Tensor, centre_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> TrustRegionOutput:
    """-sg[clamp(r, low, high)] A log pi with r = pi_policy / pi_centre.

    Inside the bounds the gradient is that of -r A; outside it is limited, and never 0 as in PPO.

    Args:
        logp: (R, T), with gradient.
        centre_logp: (R, T).
        advantages: (R, T) or (R, 1).
        mask: (R, T).
        low: Lower bound of the ratio.
        high: Upper bound of the ratio.

    Returns:
        Loss, detached ratio, and which tokens' ratio is cut.
    """
    mask = mask.bool()
    ratio = log_ratio(logp.detach(), centre_logp.detach(), mask).exp()
    capped = ratio.clamp(low, high)
    advantages = torch.where(mask, advantages, 0.0)
    return TrustRegionOutput(score_loss(logp, capped * advantages, mask), ratio, capped != ratio)


class CISPO(TrustRegion):
    """Clipped importance-sampling weights: every token keeps a gradient, a limited one (arXiv 2506.13585, MiniMax-M1).

    Loss -sg[clamp(r, 1 - clip_low, 1 + clip_high)] A log pi with r = pi_policy / pi_prox. Where the clamp does nothing
    the gradient is PPO's. `clipped` counts the tokens whose ratio is cut. Nothing stored, no passes.

    The paper bounds from above only and does not give the bound; the default is ScaleRL's cap of about 5 (arXiv
    2510.13786). verl's examples take 0.2.

    Args:
        clip_low: The ratio is cut below 1 - clip_low, null for not at all.
        clip_high: The ratio is cut above 1 + clip_high.
    """

    def __init__(self, clip_low: float | None = None, clip_high: float = 4.0) -> None:
        self.clip_low = clip_low if clip_low is None else above("CISPO.clip_low", clip_low, 0, "0.2, or null for none")
        self.clip_high = above("CISPO.clip_high", clip_high, 0, "4.0")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Apply `capped_score_loss` around prox."""
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        bounds = low, 1 + self.clip_high
        return capped_score_loss(rows.logp, rows.prox_logp, rows.advantages, rows.mask, *bounds)


class CappedImportance(TrustRegion):
    """RAPID's importance sampling: the ratio to the policy that sampled, cut from above (arXiv 2510.03515).

    Loss -sg[min(rho, cap)] A log pi with rho = pi_policy / pi_behave, so `behave_weight` must be One. `clipped` counts
    the tokens whose ratio is cut. Needs the stored behave log-probs, no passes.

    Deviations: rho is taken by token (whether the paper's is, could not be read); on fresh rows behave is prox.

    Args:
        cap: Upper bound of the ratio.
    """

    folds_weight = True

    def __init__(self, cap: float = 2.0) -> None:
        self.cap = above("CappedImportance.cap", cap, 1, "2.0")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Apply `capped_score_loss` around behave."""
        return capped_score_loss(rows.logp, sampled_logp(rows), rows.advantages, rows.mask, 0.0, self.cap)


def rec_mask(
    ratio: Tensor, advantages: Tensor, mask: RECMask, clip: tuple[float, float], ring: tuple[float, float]
) -> Tensor:
    """Tokens that REC keeps, (R, T) bool.

    one-side: A >= 0 and ratio <= 1 + clip[1], or A <= 0 and ratio >= 1 - clip[0]: those PPO gives a gradient to.
    two-side: ratio in [1 - clip[0], 1 + clip[1]].
    ring: two-side, and farther out the tokens that are to come back: A >= 0 and ratio <= 1 - ring[0], or A <= 0 and
    ratio >= 1 + ring[1].

    Args:
        ratio: (R, T).
        advantages: (R, T).
        mask: Which rule.
        clip: Distances below and above 1.
        ring: Distances below and above 1, farther out.
    """
    not_low, not_high = ratio >= 1 - clip[0], ratio <= 1 + clip[1]
    good, bad = advantages >= 0, advantages <= 0
    if mask == "none":
        return torch.ones_like(not_low)
    if mask == "one-side":
        return (good & not_high) | (bad & not_low)
    if mask == "two-side":
        return not_low & not_high
    return (not_low & not_high) | (good & (ratio <= 1 - ring[0])) | (bad & (ratio >= 1 + ring[1]))


class REC(TrustRegion):
    """REINFORCE with clipping as a mask, for any sampling policy (arXiv 2509.24203; Trinity-RFT's rec policy loss).

    Loss -c A M log pi, M the mask of `rec_mask` by the ratio pi_policy / pi_behave, c = 1 or that ratio, detached. The
    paper's finding: the mask is essential, the importance weight c is not. One-side and weighted has PPO's gradient.
    `behave_weight` must be One, since the ratio reaches back to behave. Needs the stored behave log-probs, no passes.

    Deviations: on fresh rows behave is prox, which differs by the engine's rounding. The paper's exponential advantage
    weights (RED) and regularizers (REP) are not here: see SquaredLogRatio and the advantages.

    Args:
        mask: one-side, two-side, ring or none.
        weighted: Multiply by the detached ratio.
        ratio: token, or sequence for the geometric mean over the response, as in GSPO, in mask and weight alike.
        clip_low: Inner bound below 1.
        clip_high: Inner bound above 1.
        ring_low: Outer bound below 1, for ring.
        ring_high: Outer bound above 1, for ring.
    """

    folds_weight = True

    def __init__(
        self,
        mask: RECMask = "one-side",
        weighted: bool = False,
        ratio: Literal["token", "sequence"] = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        ring_low: float = 0.6,
        ring_high: float = 2.0,
    ) -> None:
        one_of("REC.mask", mask, ("none", "one-side", "two-side", "ring"))
        one_of("REC.ratio", ratio, ("token", "sequence"))
        self.mask: RECMask = mask
        self.weighted = weighted
        self.ratio = ratio
        self.clip = (
            within("REC.clip_low", clip_low, 0, 1, "0.2"),
            above("REC.clip_high", clip_high, 0, "0.2"),
        )
        self.ring = (
            within("REC.ring_low", ring_low, self.clip[0], 1, "0.6, with clip_low below it"),
            above("REC.ring_high", ring_high, self.clip[1], "2.0, with clip_high below it"),
        )

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Give -c A M log pi, the detached ratio, and which tokens the mask drops."""
        mask, centre = rows.mask.bool(), sampled_logp(rows)
        if self.ratio == "token":
            logs = log_ratio(rows.logp.detach(), centre, mask)
        else:
            logs = torch.where(mask, sequence_log_ratio(rows.logp.detach(), centre, mask), 0.0)
        ratio = logs.exp()
        advantages = torch.where(mask, rows.advantages, 0.0)
        kept = rec_mask(ratio, advantages, self.mask, self.clip, self.ring)
        coefficient = (ratio if self.weighted else 1.0) * advantages * kept
        return TrustRegionOutput(score_loss(rows.logp, coefficient, mask), ratio, ~kept)
