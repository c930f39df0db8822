"""The critic's part of a training step: its own passes, and the tensors that follow it from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from popo_lightning.core.ranks import all_reduce
from popo_lightning.model.padded_rows import PaddedRows
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.training.gradient_sync import gradients_exchanged
from popo_lightning.training.minibatch_loss import MinibatchLoss


def add_up_critic_gradients(policy: PolicyModel, losses: MinibatchLoss, parts: Sequence[PaddedRows]) -> None:
    """Runs the critic's own passes. Gradients stay on their rank until :func:`add_up_gradients` reduces them.

    Args:
        policy: Policy with the critic. Weights must not be sharded, because ranks may have different numbers of parts.
        losses: Loss of the minibatch.
        parts: This rank's micro-batches.
    """
    for part in parts:
        rows = part.to(policy.device)
        with gradients_exchanged(policy.trainer.strategy.model, [policy.value_model], False):
            policy.manual_backward(losses.add_values(rows, policy.value_model(rows)))


@torch.no_grad()
def follow_critic(policy: PolicyModel, std_sum: Tensor | None, tokens: float) -> None:
    """Moves target copy and running standard deviation after an optimizer step. A collective if the latter exists.

    Args:
        policy: Policy that has taken the step.
        std_sum: (heads,) sum of the standard deviations of this rank's tokens, before the step.
        tokens: Number of tokens of all ranks.
    """
    critic = policy.critic
    if critic is None:
        return
    running = policy.value_model.running_std
    if running is not None:
        own = torch.zeros_like(running) if std_sum is None else std_sum  # a rank may have no rows
        sums = [all_reduce(policy.trainer, float(each), "sum") for each in own]
        running.lerp_(running.new_tensor(sums) / tokens, critic.head.running_rate)
    if critic.target is not None and policy.value_target is not None:
        critic.target.follow(policy.value_model, policy.value_target, policy.trainer.global_step)
