"""Trust regions on the ratio of a whole response."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio
from popo_lightning.objectives.settings import above
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, clipped_surrogate

LOG_SEQUENCE_RATIO_BOUND = 10.0


def sequence_log_ratio(logp: Tensor, centre_logp: Tensor, mask: Tensor) -> Tensor:
    """Mean over a response's tokens of log(pi_policy / pi_centre), the log of their geometric mean: (R, T) to (R, 1).

    With gradient; 0 for a row without tokens.
    """
    logs = log_ratio(logp, centre_logp.detach(), mask)
    return logs.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def straight_through(value: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """Per token the row's value (R, 1), with the gradient of that token's log-prob alone: (R, T), 0 at padding.

    Summed with weights 1 / length, its gradient is that of the mean log-ratio itself.
    """
    logp = torch.where(mask.bool(), logp, 0.0)
    return torch.where(mask.bool(), value.detach() + (logp - logp.detach()), 0.0)


class GSPO(TrustRegion):
    """Group Sequence Policy Optimization: PPO's clip on the ratio of the whole response (arXiv 2507.18071).

    s = exp(mean over tokens of log pi_policy / pi_prox); the loss of each token is PPO's with s for the ratio. To be
    used with SequenceMean, under which its gradient is that of the paper's objective. s is the geometric mean, so it
    moves much less than a token's ratio, hence the narrow bounds. Nothing stored, no passes.

    Deviation, as in verl: log s is cut at 10 from above. The gradient goes to each token's own log-prob with s as its
    value (straight-through), so that advantages may differ between tokens (the paper's GSPO-token).

    Args:
        clip_low: The ratio gives no more gain below 1 - clip_low.
        clip_high: The ratio gives no more gain above 1 + clip_high.
    """

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4) -> None:
        self.clip_low = above("GSPO.clip_low", clip_low, 0, "3e-4")
        self.clip_high = above("GSPO.clip_high", clip_high, 0, "4e-4")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Apply `clipped_surrogate` to s, the same for all tokens of a row."""
        log_s = sequence_log_ratio(rows.logp, rows.prox_logp, rows.mask)
        ratio = straight_through(log_s, rows.logp, rows.mask).clamp(max=LOG_SEQUENCE_RATIO_BOUND).exp()
        return clipped_surrogate(ratio, rows.advantages, rows.mask, self.clip_low, self.clip_high)
