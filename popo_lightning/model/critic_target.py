"""A target copy of the critic that follows it slowly. Returns bootstrap from the copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from popo_lightning.core.bounds import at_least, positive_share, within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.ranks import all_reduce


class TargetCritic:
    """Bootstraps the critic's target returns from a copy that lags behind the critic (2302.12537).

        delta_t = r_t + gamma V'_(t+1) - V'_t,   return_t = sum over l of (gamma lam)^l delta_(t+l) + V'_t

    where V' is the copy's value. The advantage is return_t - V_t, and the critic's clip is around V_t, where V is the
    critic's own value. After every `every` optimizer steps, with w the critic's weights and w' the copy's,

        v <- momentum v + polyak (w - w'),   w' <- w' + v

    and anchor (w - w') is added to each step's gradient. A finite `every` above 1 can converge where 1 diverges, but a
    larger one costs speed. The anchor does not move the fixed point. All values are those at the start of an iteration,
    so only steps of earlier iterations matter. With every 1, polyak 1 and momentum 0 the copy would be the critic; this
    is refused.

    Cost: another copy of the value model without gradients, two with momentum, and one further forward pass over every
    minibatch.

    Args:
        every: Number of optimizer steps between two moves of the copy.
        polyak: Fraction of the way to the critic that the copy moves. 1 copies the critic, and needs `every` above 1.
        anchor: Coefficient of the pull of the critic's weights towards the copy's, in its loss; 0 for none.
        momentum: Fraction of the copy's last move that is repeated; 0 for none.
    """

    def __init__(self, every: int = 1, polyak: float = 0.05, anchor: float = 0.0, momentum: float = 0.0) -> None:
        self.every = at_least("TargetCritic.every", every, 1, " step, such as 100")
        self.polyak = positive_share("TargetCritic.polyak", polyak, "0.05")
        self.anchor = at_least("TargetCritic.anchor", anchor, 0, ", such as 0.01")
        self.momentum = within("TargetCritic.momentum", momentum, 0, 0.999, "0.9")
        if self.every == 1 and not self.small_steps:
            raise SettingError(
                "TargetCritic has every 1, polyak 1 and momentum 0, so that its copy would always be the critic; set "
                "polyak below 1, such as 0.05, or every above 1"
            )

    @property
    def small_steps(self) -> bool:
        """Whether a move differs from copying the critic."""
        return self.polyak < 1 or self.momentum > 0

    @torch.no_grad()
    def follow(self, value_model: nn.Module, copied: TargetCopy, step: int) -> None:
        """Moves the copy if `every` optimizer steps have passed.

        Args:
            value_model: The critic.
            copied: Its copy.
            step: Number of optimizer steps taken, including this one.
        """
        if step % self.every:
            return
        for name in copied.trained:
            live, kept = own_part(value_model.get_parameter(name)), own_part(copied.model.get_parameter(name))
            if copied.speed is None:
                kept.lerp_(live, self.polyak)
            else:
                speed = own_part(copied.speed.get_parameter(name))
                speed.mul_(self.momentum).add_(live - kept, alpha=self.polyak)
                kept.add_(speed)

    @torch.no_grad()
    def pull(self, value_model: nn.Module, copied: TargetCopy) -> None:
        """Adds the anchor's term to the gradients of a step.

        Args:
            value_model: The critic, with gradients.
            copied: Its copy.
        """
        if not self.anchor:
            return
        for name in copied.trained:
            live, kept = value_model.get_parameter(name), copied.model.get_parameter(name)
            if live.grad is not None:
                own_part(live.grad).add_(own_part(live) - own_part(kept), alpha=self.anchor)


class TargetCopy(nn.Module):
    """The copy's weights, and its last move if momentum needs it.

    Both share the critic's frozen parameters, unless weights are sharded over ranks; then each has its own shards.
    Buffers are copied.

    Args:
        value_model: Value model to copy.
        target: Settings, by which the last move is kept or not; it is 0 at the start.

    Attributes:
        trained: Names of the parameters that move.
    """

    def __init__(self, value_model: nn.Module, target: TargetCritic) -> None:
        super().__init__()
        self.trained = [name for name, each in value_model.named_parameters() if each.requires_grad]
        self.model = _frozen_copy(value_model)
        self.speed = _frozen_copy(value_model) if target.momentum else None
        self.rest()

    @torch.no_grad()
    def rest(self) -> None:
        """Sets the last move to 0."""
        if self.speed is not None:
            for name in self.trained:
                own_part(self.speed.get_parameter(name)).zero_()

    @property
    def saved(self) -> set[str]:
        """Names of the parameters that a checkpoint needs."""
        parts = ["model"] if self.speed is None else ["model", "speed"]
        return {f"{part}.{name}" for part in parts for name in self.trained}


def kept_of_critic(policy: Any) -> set[str]:
    """Returns the names, in a policy's state_dict, of tensors that follow the critic without being trained."""
    copied, running = policy.value_target, "value_model.running_std"
    names = set() if copied is None else {f"value_target.{name}" for name in copied.saved}
    return names | {name for name, _ in policy.named_buffers() if name == running}


@torch.no_grad()
def follow_critic(policy: Any, std_sum: Tensor | None, tokens: float) -> None:
    """Moves target copy and running standard deviation after an optimizer step. A collective if the latter exists.

    Args:
        policy: Policy with a critic that has taken the step.
        std_sum: (heads,) sum of the standard deviations of this rank's tokens, before the step.
        tokens: Number of tokens of all ranks.
    """
    critic, running = policy.critic, policy.value_model.running_std
    if running is not None:
        own = torch.zeros_like(running) if std_sum is None else std_sum  # a rank may have no rows
        sums = [all_reduce(policy.trainer, float(each), "sum") for each in own]
        running.lerp_(running.new_tensor(sums) / tokens, critic.head.running_rate)
    if critic.target is not None:
        critic.target.follow(policy.value_model, policy.value_target, policy.trainer.global_step)


def _frozen_copy(value_model: nn.Module) -> Any:
    shared = {id(each): each for each in value_model.parameters() if not each.requires_grad}
    return copy.deepcopy(value_model, shared).requires_grad_(False)


def own_part(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor, or the whole tensor if it is not sharded."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part
