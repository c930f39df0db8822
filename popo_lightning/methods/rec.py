"""REC: REINFORCE with a mask on the ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from popo_lightning.core.bounds import above, one_of, within
from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio, sampled_logp, sequence_log_ratio
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, score_loss

RECMask = Literal["none", "one-side", "two-side", "ring"]


def rec_mask(
    ratio: Tensor, advantages: Tensor, mask: RECMask, clip: tuple[float, float], ring: tuple[float, float]
) -> Tensor:
    """Marks the tokens that REC keeps, (R, T) bool.

    one-side: A >= 0 and ratio <= 1 + clip[1], or A <= 0 and ratio >= 1 - clip[0]; PPO gives these tokens a gradient.
    two-side: ratio in [1 - clip[0], 1 + clip[1]].
    ring: two-side, and tokens farther out whose advantage pulls them back: A >= 0 and ratio <= 1 - ring[0], or A <= 0
    and ratio >= 1 + ring[1].

    Args:
        ratio: (R, T) ratios.
        advantages: (R, T) advantages.
        mask: Name of the rule.
        clip: Distances of the inner bounds below and above 1.
        ring: Distances of the outer bounds below and above 1.
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


@dataclass(eq=False)
class REC(TrustRegion):
    """REINFORCE with clipping as a mask, for any sampling policy (arXiv 2509.24203; Trinity-RFT's rec policy loss).

    Loss -c A M log pi, with M the mask of `rec_mask` on the ratio pi_policy / pi_behave, and c = 1 or that ratio,
    detached. The paper finds the mask essential and the importance weight c not. One-side and weighted has PPO's
    gradient. `behave_weight` must be NoCorrection, because the ratio is already relative to behave. It needs the stored
    behave log-probs. Extra passes: none.

    Deviations: on fresh rows behave is prox, which differs by the engine's rounding. The paper's exponential advantage
    weights (RED) and regularizers (REP) are separate classes: see SquaredLogRatio and the advantages.

    Args:
        mask: one-side, two-side, ring or none.
        weighted: Multiply by the detached ratio.
        ratio: token, or sequence for the geometric mean over the response, as in GSPO. It applies to mask and weight.
        clip_low: Distance of the inner bound below 1.
        clip_high: Distance of the inner bound above 1.
        ring_low: Distance of the outer bound below 1, for ring.
        ring_high: Distance of the outer bound above 1, for ring.
    """

    includes_is_weight = True

    mask: RECMask = "one-side"
    weighted: bool = False
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ring_low: float = 0.6
    ring_high: float = 2.0

    def __post_init__(self) -> None:
        one_of("REC.mask", self.mask, get_args(RECMask))
        one_of("REC.ratio", self.ratio, ("token", "sequence"))
        within("REC.clip_low", self.clip_low, 0, 1, "0.2")
        above("REC.clip_high", self.clip_high, 0, "0.2")
        within("REC.ring_low", self.ring_low, self.clip_low, 1, "0.6, with clip_low below it")
        above("REC.ring_high", self.ring_high, self.clip_high, "2.0, with clip_high below it")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Returns -c A M log pi, the detached ratio, and which tokens the mask drops."""
        mask, center = rows.mask.bool(), sampled_logp(rows)
        if self.ratio == "token":
            logs = log_ratio(rows.logp.detach(), center, mask)
        else:
            logs = torch.where(mask, sequence_log_ratio(rows.logp.detach(), center, mask), 0.0)
        ratio = logs.exp()
        advantages = torch.where(mask, rows.advantages, 0.0)
        bounds = (self.clip_low, self.clip_high), (self.ring_low, self.ring_high)
        kept = rec_mask(ratio, advantages, self.mask, *bounds)
        coefficient = (ratio if self.weighted else 1.0) * advantages * kept
        return TrustRegionOutput(score_loss(rows.logp, coefficient, mask), ratio, ~kept)
