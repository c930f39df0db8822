"""Baselines for groups that restart inside one another's responses, a tree of prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from popo_lightning.groups import Group
from popo_lightning.objectives.advantages import Advantage, check_group_size, zero_if_ineffective
from popo_lightning.objectives.settings import one_of

Kind = Literal["mean", "max", "min"]


class TreeBaseline(Advantage):
    """Tree-OPO's cheap advantages: R minus the mean, best or worst reward below the group's prefix (arXiv 2509.09284).

    Below a prefix are the group's own responses and those of deeper restarts, `group.subtree_rewards`, which a
    composer that restarts from prefixes attaches. mean expects what the subtree got, max is optimistic (only the best
    is not punished), min pessimistic (only the worst is not rewarded). No division by the std. No extra pass.

    A group whose subtree's rewards all agree gets exactly 0. One that is all wrong beside right restarts does not: it
    is told that a right answer was in reach.

    Deviations: the source's main rule, a quadratic program with order constraints over the tree, is not this class.
    Subtree rewards are the training reward, where the source has outcomes of 0 and 1.

    Args:
        kind: mean, max or min.
    """

    def __init__(self, kind: Kind = "mean") -> None:
        one_of("TreeBaseline.kind", kind, get_args(Kind))
        self.kind: Kind = kind

    def __call__(self, rewards: Tensor) -> Tensor:
        """Map rewards (G, K) to advantages (G, K), as of groups without deeper restarts."""
        return self._against(rewards, rewards)

    def for_group(
        self,
        group: Group,
        reward: str,
        prox_logp: Sequence[Tensor] | None = None,
        values: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Advantages (), one a response."""
        rewards = group.rewards(reward)
        deeper = group.subtree_rewards
        subtree = rewards if deeper is None else torch.cat((rewards, deeper.to(rewards)))
        return list(self._against(rewards, subtree).unbind())

    def _against(self, rewards: Tensor, subtree: Tensor) -> Tensor:
        check_group_size(subtree)
        if self.kind == "mean":
            baseline = subtree.mean(dim=-1, keepdim=True)
        elif self.kind == "max":
            baseline = subtree.amax(dim=-1, keepdim=True)
        else:
            baseline = subtree.amin(dim=-1, keepdim=True)
        return zero_if_ineffective(rewards - baseline, subtree)
