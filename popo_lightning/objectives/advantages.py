"""Advantages: from the rewards of a group to one number a response."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from popo_lightning.errors import SettingError

# Equal rewards can have a std of 1e-9 by rounding (seven 0.1 in float32), so a group's spread is tested, not its std.
SPREAD_TOLERANCE = 1e-6


def group_normalised(rewards: Tensor, eps: float = 1e-6, normalise_by_std: bool = True) -> Tensor:
    """Reward minus the group's mean, divided by the group's standard deviation.

    GRPO, arXiv 2402.03300 section 4.1. Without the division: Dr.GRPO, arXiv 2503.20783. A stored group keeps its
    rewards, so computing this again for a replayed group gives the advantages of the day it was sampled.

    Deviations: the std is the unbiased one, as in verl (the paper does not say). A group whose rewards differ by at
    most 1e-6 gets exactly 0; the formula would turn rounding errors into small advantages.

    Args:
        rewards: (G, K), G groups of K responses.
        eps: Added to the std.
        normalise_by_std: Divide by std + eps.

    Returns:
        (G, K) advantages.
    """
    if rewards.shape[-1] < 2:
        raise SettingError(
            f"A group of {rewards.shape[-1]} response(s) has no group advantage; sample at least 2 responses a prompt."
        )
    advantages = rewards - rewards.mean(dim=-1, keepdim=True)
    if normalise_by_std:
        advantages = advantages / (rewards.std(dim=-1, keepdim=True, correction=1) + eps)
    spread = rewards.amax(dim=-1, keepdim=True) - rewards.amin(dim=-1, keepdim=True)
    return torch.where(spread > SPREAD_TOLERANCE, advantages, 0.0)


class Advantage(ABC):
    """Slot: how the rewards of a group become advantages."""

    @abstractmethod
    def __call__(self, rewards: Tensor) -> Tensor:
        """Map rewards (G, K) to advantages (G, K)."""


class GroupNormalised(Advantage):
    """GRPO's advantage, (R - mean) / (std + eps) within the group; without the std it is Dr.GRPO's.

    Args:
        normalise_by_std: Divide by the group's std; false gives Dr.GRPO (arXiv 2503.20783).
        eps: Added to the std, so that nearly equal rewards do not give huge advantages.
    """

    def __init__(self, normalise_by_std: bool = True, eps: float = 1e-6) -> None:
        if not 0 <= eps < math.inf:
            raise SettingError(f"GroupNormalised.eps is {eps}; it must be a finite number of at least 0, such as 1e-6.")
        self.normalise_by_std = normalise_by_std
        self.eps = eps

    def __call__(self, rewards: Tensor) -> Tensor:
        """Map rewards (G, K) to advantages (G, K)."""
        return group_normalised(rewards, eps=self.eps, normalise_by_std=self.normalise_by_std)
