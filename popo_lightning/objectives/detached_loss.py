"""Trust regions with a detached ratio: REINFORCE's -c A log pi with a bounded or masked c (CISPO, RAPID, REC)."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.objectives.inputs import log_ratio
from popo_lightning.objectives.trust_regions import TrustRegionOutput, score_loss


def capped_score_loss(
    logp: Tensor, center_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> TrustRegionOutput:
    """-sg[clamp(r, low, high)] A log pi with r = pi_policy / pi_centre.

    Inside the bounds the gradient is that of -r A; outside it is limited, and never 0 as in PPO.

    Args:
        logp: (R, T), with gradient.
        center_logp: (R, T).
        advantages: (R, T) or (R, 1).
        mask: (R, T).
        low: Lower bound of the ratio.
        high: Upper bound of the ratio.

    Returns:
        Loss, detached ratio, and which tokens' ratio is cut.
    """
    mask = mask.bool()
    ratio = log_ratio(logp.detach(), center_logp.detach(), mask).exp()
    capped = ratio.clamp(low, high)
    advantages = torch.where(mask, advantages, 0.0)
    return TrustRegionOutput(score_loss(logp, capped * advantages, mask), ratio, capped != ratio)
