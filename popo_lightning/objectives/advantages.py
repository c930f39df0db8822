"""Advantages: from the rewards of a group to one number per response, or one per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import REWARD_TOLERANCE, Group
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.objectives.weights import BehaveWeight, NoCorrection


def zero_if_ineffective(advantages: Tensor, rewards: Tensor) -> Tensor:
    """Sets the advantages of groups whose rewards differ by at most 1e-6 to exactly 0, where formulas leave rounding.

    Args:
        advantages: (..., K) advantages.
        rewards: (..., K) rewards.
    """
    spread = rewards.amax(dim=-1, keepdim=True) - rewards.amin(dim=-1, keepdim=True)
    return torch.where(spread > REWARD_TOLERANCE, advantages, 0.0)


def check_group_size(rewards: Tensor) -> None:
    """Raises SettingError for groups too small to compare responses in.

    Args:
        rewards: (..., K) rewards.
    """
    if rewards.shape[-1] < 2:
        raise SettingError(
            f"A group of {rewards.shape[-1]} response(s) has no group advantage; sample at least 2 responses a prompt "
            "(data.group_size)."
        )


def group_normalized(rewards: Tensor, eps: float = 1e-6, normalize_by_std: bool = True) -> Tensor:
    """Returns the rewards minus the group's mean, divided by the group's standard deviation.

    This is GRPO's advantage (arXiv 2402.03300 section 4.1); without the division it is Dr.GRPO's (arXiv 2503.20783). A
    stored group keeps its rewards, so a replayed group gets the same advantages as when it was sampled.

    Deviations: the std is the unbiased one, as in verl (the paper does not say). A group whose rewards differ by at
    most 1e-6 gets exactly 0; the formula would turn rounding errors into small advantages.

    Args:
        rewards: (G, K), G groups of K responses.
        eps: Added to the std.
        normalize_by_std: Divide by std + eps.

    Returns:
        (G, K) advantages.
    """
    check_group_size(rewards)
    advantages = rewards - rewards.mean(dim=-1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (rewards.std(dim=-1, keepdim=True, correction=1) + eps)
    return zero_if_ineffective(advantages, rewards)


class Advantage(KeepsState, ABC):
    """Slot: turns the rewards of a group into advantages.

    Attributes:
        needs_prox: Whether `for_group` reads the proximal log-probs of replayed groups.
        needs_values: Whether `for_group` reads a critic's values.
        whitens: Whether the advantages of a minibatch are shifted and scaled over all its tokens (`whiten`).
        bootstraps: Whether the returns that a critic learns contain values of later states.
        includes_is_weight: Whether the advantages already contain pi_prox / pi_behave, so that the behavior weight
            must be NoCorrection.
    """

    needs_prox: bool = False
    needs_values: bool = False
    whitens: bool = False
    bootstraps: bool = False
    includes_is_weight: bool = False

    @abstractmethod
    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K)."""

    def for_group(
        self,
        group: Group,
        reward: str,
        prox_logp: Sequence[Tensor] | None = None,
        values: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Returns the advantages of one group in a minibatch.

        Args:
            group: K graded responses.
            reward: Reward component that is trained on.
            prox_logp: (T,) proximal log-probs of each response; None for a group that prox itself sampled.
            values: (T,) a critic's values of the states before each response token, for each response.

        Returns:
            One tensor per response: () for all its tokens, or (T,).
        """
        return list(self(group.rewards(reward)[None])[0].unbind())

    def objection(self, group_size: int) -> str | None:
        """Says why groups of this size cannot be used, naming data.group_size; None if they can.

        Args:
            group_size: Number of responses per group, K.
        """
        return None


def check_weight(advantage: Advantage, behave_weight: BehaveWeight) -> None:
    """Raises SettingError if the behavior policy would be corrected for twice."""
    if advantage.includes_is_weight and not isinstance(behave_weight, NoCorrection):
        raise SettingError(
            f"model.behave_weight is {type(behave_weight).__name__}, but the advantages of "
            f"{type(advantage).__name__} with off_policy hold pi_prox / pi_behave already; use NoCorrection with it."
        )


class GroupNormalized(Advantage):
    """GRPO's advantage, (R - mean) / (std + eps) within the group; without the std it is Dr.GRPO's.

    Args:
        normalize_by_std: Divide by the group's std; false gives Dr.GRPO (arXiv 2503.20783).
        eps: Added to the std, so that nearly equal rewards do not give huge advantages.
    """

    def __init__(self, normalize_by_std: bool = True, eps: float = 1e-6) -> None:
        self.normalize_by_std = normalize_by_std
        self.eps = at_least("GroupNormalized.eps", eps, 0, ", such as 1e-6")

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K)."""
        return group_normalized(rewards, eps=self.eps, normalize_by_std=self.normalize_by_std)


class LeaveOneOut(Advantage):
    """RLOO's advantage: R_i minus the mean of the group's other rewards (arXiv 2402.14740).

    It equals K / (K - 1) times Dr.GRPO's. The baseline does not contain the response itself, so the gradient is
    unbiased. Stored: nothing. Extra passes: none. Ineffective groups get exactly 0.

    Deviation: the source may put a KL penalty into the reward; here a KL is a regularizer of the objective.
    """

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K)."""
        check_group_size(rewards)
        others = (rewards.sum(dim=-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
        return zero_if_ineffective(rewards - others, rewards)
