"""GSPO: PPO's clip of the sequence ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.core.bounds import above
from popo_lightning.objectives.inputs import ObjectiveInputs, sequence_log_ratio
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, clipped_surrogate

LOG_SEQUENCE_RATIO_BOUND = 10.0


def straight_through(value: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """Gives each token its row's value (R, 1), with the gradient of only that token's log-prob: (R, T), 0 at padding.

    Its mean over a row has the gradient of the mean log-ratio itself.
    """
    logp = torch.where(mask.bool(), logp, 0.0)
    return torch.where(mask.bool(), value.detach() + (logp - logp.detach()), 0.0)


class GSPO(TrustRegion):
    """Group Sequence Policy Optimization: PPO's clip of the whole response's ratio (arXiv 2507.18071).

    s = exp(mean over tokens of log pi_policy / pi_prox); the loss of each token is PPO's with s as the ratio. Use it
    with SequenceMean, under which its gradient is that of the paper's objective. s is a geometric mean and moves much
    less than a token's ratio, hence the narrow bounds. Stored: nothing. Extra passes: none.

    Deviation, as in verl: log s is clamped to at most 10. The gradient flows to each token's own log-prob with s as its
    value (straight-through), so that advantages may differ between tokens (the paper's GSPO-token).

    Args:
        clip_low: Ratios below 1 - clip_low give no further gain.
        clip_high: Ratios above 1 + clip_high give no further gain.
    """

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4) -> None:
        self.clip_low = above("GSPO.clip_low", clip_low, 0, "3e-4")
        self.clip_high = above("GSPO.clip_high", clip_high, 0, "4e-4")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Applies `clipped_surrogate` to s, which is the same for all tokens of a row."""
        log_s = sequence_log_ratio(rows.logp, rows.prox_logp, rows.mask)
        ratio = straight_through(log_s, rows.logp, rows.mask).clamp(max=LOG_SEQUENCE_RATIO_BOUND).exp()
        return clipped_surrogate(ratio, rows.advantages, rows.mask, self.clip_low, self.clip_high)
