"""Ratios of a whole response, for trust regions and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.objectives.inputs import log_ratio

LOG_SEQUENCE_RATIO_BOUND = 10.0


def sequence_log_ratio(logp: Tensor, center_logp: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of log(pi_policy / pi_centre) over a response's tokens, with gradient: (R, T) to (R, 1).

    It is the log of the ratios' geometric mean, and 0 for a row without tokens.
    """
    logs = log_ratio(logp, center_logp.detach(), mask)
    return logs.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def straight_through(value: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """Gives each token its row's value (R, 1), with the gradient of only that token's log-prob: (R, T), 0 at padding.

    Its mean over a row has the gradient of the mean log-ratio itself.
    """
    logp = torch.where(mask.bool(), logp, 0.0)
    return torch.where(mask.bool(), value.detach() + (logp - logp.detach()), 0.0)
