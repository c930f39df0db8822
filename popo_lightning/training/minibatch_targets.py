"""The targets of a minibatch: advantages for the policy, and returns for a critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.ranks import all_reduce
from popo_lightning.model.critic import Critic
from popo_lightning.model.nested_head import problem_groups
from popo_lightning.objectives.advantages import Advantage
from popo_lightning.objectives.generalized_advantage import moments, whiten


@dataclass(frozen=True)
class MinibatchTargets:
    """Targets of every row, in the order of the minibatch.

    Args:
        advantages: One tensor per row: () for the whole response, or (T,); before whitening and without charges.
        of_critic: "values" and "returns" with one (T,) tensor per row, and for a nested critic "problem_group" with one
            () tensor per row; empty without a critic.
    """

    advantages: list[Tensor]
    of_critic: dict[str, list[Tensor]]


def minibatch_targets(
    minibatch: Minibatch,
    advantage: Advantage,
    reward: str,
    critic: Critic | None,
    estimates: Mapping[str, Sequence[Tensor]],
) -> MinibatchTargets:
    """Computes advantages and returns from rewards and the critic's estimates.

    Without a target copy a return is A + V. With one, the return is A' + V', where A' and V' use the copy's values, and
    the advantage is the return minus the critic's own V. If the head has a sigma_floor, advantages are divided by the
    critic's standard deviation.

    Args:
        minibatch: Minibatch with the rows.
        advantage: The run's advantage.
        reward: Reward component that is trained on.
        critic: Settings of the critic, or None.
        estimates: "values", "target_values" and "value_std", as far as they exist.
    """
    values = estimates.get("values")
    behind = estimates.get("target_values", values)
    advantages = _by_group(minibatch, advantage, reward, behind)
    if critic is None or values is None or behind is None:
        return MinibatchTargets(advantages, {})
    returns = [each + value for each, value in zip(advantages, behind, strict=True)]
    if behind is not values:
        together = zip(advantages, behind, values, strict=True)
        advantages = [each + (copied - live) for each, copied, live in together]
    floor = critic.head.sigma_floor
    if floor is not None and "value_std" in estimates:
        together_std = zip(advantages, estimates["value_std"], strict=True)
        advantages = [each / std.clamp(min=floor) for each, std in together_std]
    if minibatch.tokens:
        flat = torch.cat(returns)
        critic.head.check_returns(float(flat.min()), float(flat.max()))
    of_critic = {"values": list(values), "returns": returns} | problem_groups(minibatch, critic.head)
    return MinibatchTargets(advantages, of_critic)


def _by_group(minibatch: Minibatch, advantage: Advantage, reward: str, values: Sequence[Tensor] | None) -> list[Tensor]:
    recorded = minibatch.recorded
    found: list[Tensor] = []
    for group in minibatch.groups:
        if group.advantages is not None:
            found += group.advantages.unbind()
            continue
        here = slice(len(found), len(found) + len(group.responses))
        # Fresh groups get none: prox sampled them, and the difference of engine and trainer is not a policy change.
        old = group.version < minibatch.version and "prox_logp" in recorded
        prox = recorded["prox_logp"][here] if old else None
        found += advantage.for_group(group, reward, prox, None if values is None else values[here])
    return found


def whitened_over_ranks(trainer: L.Trainer, advantages: Sequence[Tensor]) -> list[Tensor]:
    """Shifts and scales advantages over all tokens of a minibatch on all ranks. A collective.

    Args:
        trainer: Trainer of the ranks.
        advantages: (T,) or () advantages of each row on this rank.
    """
    of_all = torch.tensor([all_reduce(trainer, float(moment), "sum") for moment in moments(advantages)])
    return whiten(advantages, of_all)
