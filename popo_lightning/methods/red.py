"""RED-Drop and RED-Weight (arXiv 2509.24203): negative responses dropped, or positive ones weighted up."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.core.bounds import above
from popo_lightning.objectives.advantages import Advantage, check_group_size, group_normalized, zero_if_ineffective

EXPONENT_BOUND = 20.0  # keeps exp finite in float32; only temperatures far below the rewards' spread reach it


class DropSurplusNegatives(Advantage):
    """RED-Drop: in a group with more losers than winners, keeps as many losers (arXiv 2509.24203; Trinity-RFT).

    Winners are the responses with R >= mean. If the losers outnumber them, the surplus gets advantage 0, and the others
    get R minus the mean of the kept responses. Stored: nothing. Extra passes: none. Ineffective groups get exactly 0.

    Deviations: the last losers of the group are dropped, where Trinity-RFT draws them. Responses are independent draws
    of one policy, so their order carries no information, and a replayed group drops the same ones again. Dropped tokens
    still count in the loss denominator.
    """

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K)."""
        check_group_size(rewards)
        wins = rewards >= rewards.mean(dim=-1, keepdim=True)
        losers_so_far = (~wins).cumsum(dim=-1)
        kept = wins | (losers_so_far <= wins.sum(dim=-1, keepdim=True))
        mean = (rewards * kept).sum(dim=-1, keepdim=True) / kept.sum(dim=-1, keepdim=True)
        return zero_if_ineffective(torch.where(kept, rewards - mean, 0.0), rewards)


class ExponentialWeight(Advantage):
    """RED-Weight: A * exp(A / temperature) with A = R - mean (arXiv 2509.24203; Trinity-RFT).

    Winners count more and losers less, more strongly at a lower temperature. The weights are not normalized, as in
    Trinity-RFT. Stored: nothing. Extra passes: none. Ineffective groups get exactly 0.

    Deviation: the exponent is clamped to +-20, so the weight stays finite in float32.

    Args:
        temperature: Temperature in units of the reward.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = above("ExponentialWeight.temperature", temperature, 0, "1.0")

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K)."""
        advantages = group_normalized(rewards, normalize_by_std=False)
        return advantages * (advantages / self.temperature).clamp(-EXPONENT_BOUND, EXPONENT_BOUND).exp()
