"""OPMD (arXiv 2509.24203): a soft baseline between the group's mean and its best."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from popo_lightning.core.bounds import above
from popo_lightning.objectives.advantages import Advantage, check_group_size, zero_if_ineffective


class SoftBaseline(Advantage):
    """OPMD's alternative baseline: R - tau * log mean exp(R / tau) (arXiv 2509.24203, REP family; Trinity-RFT).

    The baseline is the value of the group under a policy that may move from the sampling policy at a cost of tau * KL.
    It is the mean for large tau and the best reward for small tau. Stored: nothing. Extra passes: none. Ineffective
    groups get exactly 0.

    Args:
        tau: Temperature of the mean, in units of the reward.
    """

    def __init__(self, tau: float = 1.0) -> None:
        self.tau = above("SoftBaseline.tau", tau, 0, "1.0")

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K)."""
        check_group_size(rewards)
        total = torch.logsumexp(rewards / self.tau, dim=-1, keepdim=True)
        baseline = self.tau * (total - math.log(rewards.shape[-1]))
        return zero_if_ineffective(rewards - baseline, rewards)
