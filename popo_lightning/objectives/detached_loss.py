"""Trust regions with a detached ratio: REINFORCE's -c A log pi with a bounded or masked c (CISPO, RAPID, REC)."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.objectives.inputs import log_ratio
from popo_lightning.objectives.trust_regions import TrustRegionOutput, score_loss


def capped_score_loss(
    logp: Tensor, center_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> TrustRegionOutput:
    """Computes -sg[clamp(r, low, high)] A log pi with r = pi_policy / pi_centre.

    Inside the bounds the gradient is that of -r A. Outside it is limited, but not 0 as in PPO.

    Args:
        logp: (R, T) log-probs under the policy, with gradient.
        center_logp: (R, T) log-probs under the centre.
        advantages: (R, T) or (R, 1) advantages.
        mask: (R, T), true at response tokens.
        low: Lower bound of the ratio.
        high: Upper bound of the ratio.

    Returns:
        Loss, detached ratio, and which tokens have a clamped ratio.
    """
    mask = mask.bool()
    ratio = log_ratio(logp.detach(), center_logp.detach(), mask).exp()
    capped = ratio.clamp(low, high)
    advantages = torch.where(mask, advantages, 0.0)
    return TrustRegionOutput(score_loss(logp, capped * advantages, mask), ratio, capped != ratio)
