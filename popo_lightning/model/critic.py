"""The critic: values of a response's states, for advantages that need them (PPO)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from popo_lightning.core.bounds import above, at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.model.critic_heads import ScalarHead, ValueHead
from popo_lightning.model.critic_target import TargetCopy, TargetCritic
from popo_lightning.model.nested_head import chosen
from popo_lightning.model.padded_rows import PaddedRows
from popo_lightning.model.scoring import response_states, scatter_to_mask
from popo_lightning.objectives.advantages import Advantage

FIRST_DIFFERENCE = 0.1  # initial standard deviation of the differences between heads' outputs


class Critic:
    """A value model beside the policy, trained by the same optimizer in its own parameter group.

    It starts as a copy of the policy without its output head, because reward models of the right size are rare. Its
    first linear head starts at 0, so the first values of ScalarHead, GaussianHead and NestedHead are 0, and those of
    CategoricalHead are the middle of its atoms. Source: PPO, arXiv 1707.06347; the defaults are verl's.
    docs/methods/critics.md says when another head, a target copy or further heads can matter.

    Cost: a second model with its gradients and optimizer state, one forward pass without gradient over every minibatch,
    and one with gradient. The checkpoint holds it like the policy.

    Args:
        lr: Learning rate of the value model. All other settings of model.optimizer apply to both models.
        value_clip: Distance from the recorded value beyond which a value gets no gradient to move farther; null for no
            bound, as further heads need.
        max_grad_norm: Gradient-clipping norm of the value model, apart from the policy's; null disables clipping.
        head: Form of the critic's output for a state: ScalarHead, GaussianHead, CategoricalHead or NestedHead.
        heads: Number of heads on the one value model, such as 2 for twin heads (TD3, 1802.09477). The smallest value
            counts. Each learns from all returns; further heads start with small random weights, or all would stay
            equal.
        target: Copy of the value model from which returns bootstrap; null bootstraps from the critic itself.
    """

    def __init__(
        self,
        lr: float = 1e-5,
        value_clip: float | None = 0.5,
        max_grad_norm: float | None = 1.0,
        head: ValueHead = ScalarHead(),  # noqa: B008  # settings only, and never changed
        heads: int = 1,
        target: TargetCritic | None = None,
    ) -> None:
        self.lr = at_least("Critic.lr", lr, 0, ", such as 1e-5")
        self.value_clip = None if value_clip is None else above("Critic.value_clip", value_clip, 0, "0.5, or null")
        self.max_grad_norm = (
            None if max_grad_norm is None else above("Critic.max_grad_norm", max_grad_norm, 0, "1.0, or null")
        )
        if value_clip is not None and not head.bounds_movement:
            raise SettingError(
                f"model.critic.value_clip is {value_clip}, but model.critic.head is {type(head).__name__}, which "
                "learns a distribution, whose movement it cannot bound; set value_clip to null"
            )
        self.head = head
        self.heads = at_least("Critic.heads", heads, 1, ", such as 2 for twin heads")
        if value_clip is not None and heads > 1:
            raise SettingError(
                f"model.critic.value_clip is {value_clip}, but model.critic.heads is {heads}, of which the least value "
                "alone is recorded, so that it would stop heads far from it; set value_clip to null"
            )
        self.target = target

    @property
    def outputs(self) -> int:
        """Number of outputs per state, over all heads and groups."""
        return self.heads * self.head.width + len(self.head.groups)

    @property
    def copies(self) -> int:
        """Number of copies of the trained weights: the target, and its last move if momentum needs it."""
        return 0 if self.target is None else 2 if self.target.momentum else 1

    def copied(self, value_model: ValueModel) -> TargetCopy | None:
        """Returns a target copy of a value model as it is now; None without a target."""
        return None if self.target is None else TargetCopy(value_model, self.target)

    def head_weights(self, hidden: int) -> dict[str, Tensor]:
        """Returns the heads' initial weights by name, on the CPU.

        Args:
            hidden: Width of the hidden states.
        """
        with torch.device("cpu"):
            weight = torch.zeros(self.heads, self.head.width, hidden)
            generator = torch.Generator().manual_seed(0)  # separate, so that the run's draws do not change
            drawn = torch.randn(weight[1:].shape, generator=generator)
            weight[1:] = drawn * (FIRST_DIFFERENCE / hidden**0.5)
            found = {"head.weight": weight.flatten(0, 1), "head.bias": torch.zeros(self.heads * self.head.width)}
            if groups := len(self.head.groups):
                found |= {"delta.weight": torch.zeros(groups, hidden), "delta.bias": torch.zeros(groups)}
        return found

    def first_weights(self, model: Any) -> dict[str, Tensor]:
        """Returns all initial weights of a policy's value model by name. Those of its base are the policy's own."""
        base: Any = model.base_model
        found = {f"base.{name}": parameter.detach() for name, parameter in base.named_parameters()}
        return found | self.head_weights(model.config.get_text_config().hidden_size)

    def by_head(self, out: Tensor) -> Tensor:
        """Reshapes a value model's output to (..., heads, O)."""
        single = self.heads * self.head.width == 1
        return out.reshape(*(out.shape if single else out.shape[:-1]), self.heads, self.head.width)

    def estimates(self, out: Tensor) -> dict[str, Tensor]:
        """Returns the smallest value of the heads, and that head's standard deviation if it learns one.

        Args:
            out: (...) or (..., heads O) output of the value model.

        Returns:
            "values" and perhaps "value_std", each (...).
        """
        heads = self.by_head(out)
        values, least = self.head.value(heads).min(dim=-1, keepdim=True)
        found = {"values": values[..., 0]}
        std = self.head.std(heads)
        return found if std is None else found | {"value_std": std.gather(-1, least)[..., 0]}

    def estimates_of(self, outs: Sequence[Tensor], copied: Sequence[Tensor] | None) -> dict[str, list[Tensor]]:
        """Returns :meth:`estimates` of many outputs: under each name, one tensor per output.

        Args:
            outs: Outputs of the value model.
            copied: Outputs of its target copy, for the name "target_values"; None without one.
        """
        found = [self.estimates(out) for out in outs]
        named = {name: [each[name] for each in found] for name in (found[0] if found else ("values",))}
        return named if copied is None else named | {"target_values": [self.estimates(c)["values"] for c in copied]}

    def shape_gradients(self, value_model: nn.Module, copied: TargetCopy | None, iteration: int) -> None:
        """Adds to a step's gradients the terms that pull weights towards other weights.

        Args:
            value_model: Value model with the gradients of a step.
            copied: Its target copy.
            iteration: Iteration of the step, counted from 0.
        """
        self.head.shape_gradients(value_model, iteration)
        if self.target is not None and copied is not None:
            self.target.pull(value_model, copied)

    def loss(
        self,
        out: Tensor,
        old_values: Tensor,
        returns: Tensor,
        mask: Tensor,
        denominator: float,
        running_std: Tensor | None = None,
    ) -> Tensor:
        """Returns the mean of the heads' losses. `value_clip` bounds their movement, as PPO's implementations do.

            sum over tokens of max(l(V), l(clip(V, V_old - c, V_old + c))) / denominator

        with l the head's loss, 0.5 (V - return)^2 for ScalarHead.

        Args:
            out: (R, T) or (R, T, heads O) output of the value model, with gradient.
            old_values: (R, T) recorded values.
            returns: (R, T) target returns.
            mask: (R, T) bool, true at response tokens; other positions may hold any value.
            denominator: Number of response tokens of the whole minibatch, over its micro-batches and ranks.
            running_std: (heads,) running standard deviations of the value model, for a head that learns one.
        """
        # Padding is cleared before the losses, so that not even its NaN reaches the backward pass.
        old_values, returns = (torch.where(mask, each, 0.0) for each in (old_values, returns))
        heads = torch.where(mask[..., None, None], self.by_head(out), 0.0)
        running = [None] * self.heads if running_std is None else running_std.unbind()
        parts = []
        for each, std in zip(heads.unbind(-2), running, strict=True):
            losses = self.head.losses(each, returns, std)
            if self.value_clip is not None:
                old = old_values[..., None]
                bounded = torch.clamp(each, old - self.value_clip, old + self.value_clip)
                losses = torch.maximum(losses, self.head.losses(bounded, returns, std))
            parts.append(torch.where(mask, losses, 0.0).sum() / denominator)
        return parts[0] if self.heads == 1 else torch.stack(parts).mean()


class ValueModel(nn.Module):
    """A language model without its output head, and linear heads that give numbers for each position.

    Args:
        model: The policy. Its base model is copied, including frozen parameters and gradient checkpointing.
        critic: Settings of the critic.

    Attributes:
        running_std: (heads,) running mean of the standard deviation over the steps, for a head that learns one.
    """

    running_std: Tensor | None

    def __init__(self, model: Any, critic: Critic) -> None:
        super().__init__()
        self.base = copy.deepcopy(model.base_model)
        hidden = model.config.get_text_config().hidden_size
        head = critic.head
        # Always float32, because bfloat16 would round away steps of 1e-5 on weights that start at 0.
        self.head = nn.Linear(hidden, critic.heads * head.width, device=model.device)
        self.delta = nn.Linear(hidden, len(head.groups), device=model.device) if head.groups else None
        with torch.no_grad():
            for name, weight in critic.head_weights(hidden).items():
                self.get_parameter(name).copy_(weight)
        std = head.std(torch.zeros(critic.heads, head.width, device="cpu"))
        self.register_buffer("running_std", std)
        self.training = model.training

    def forward(self, rows: PaddedRows) -> Tensor:
        """Computes the outputs for the state before each response token.

        Args:
            rows: R padded rows on this module's device.

        Returns:
            (R, T) float32, aligned with `rows.mask` and 0 at padding; (R, T, heads O) if heads O is more than 1.
        """
        # A sharded base has its own.
        states = (getattr(self.base, "response_states", None) or partial(response_states, self.base))(rows)
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            found = self.head(states)
            if self.delta is not None:  # also for rows without a group: ranks wait for the gradients of all weights
                none = torch.full_like(rows.index[:, None], -1)
                group = rows.columns.get("problem_group", none).expand(rows.mask.shape)[rows.mask].long()
                found = found + chosen(self.delta(states), group)[:, None]
            return scatter_to_mask(found.squeeze(-1), rows.mask)


def check_critic(critic: Critic | None, advantage: Advantage, dtype: str = "float32", adapters: bool = False) -> None:
    """Raises SettingError if an advantage lacks its critic, or a part of a critic would have no effect.

    Args:
        critic: Settings of the critic, or None.
        advantage: The run's advantage.
        dtype: Type of the model's weights.
        adapters: Whether only adapters are trained, which are always float32.
    """
    name = type(advantage).__name__
    if advantage.needs_values and critic is None:
        raise SettingError(
            f"model.advantage is {name}, which needs a critic's values, but model.critic is null; set it to "
            "popo_lightning.model.critic.Critic"
        )
    if critic is None:
        return
    if not advantage.needs_values:
        raise SettingError(
            f"model.critic is set but model.advantage is {name}, which uses no values; leave the critic out, or choose "
            "popo_lightning.objectives.generalized_advantage.GAE"
        )
    if critic.target is not None and not advantage.bootstraps:
        raise SettingError(
            "model.critic.target is set, but a target critic has no effect at lam 1, where returns are rewards alone; "
            "set model.advantage.lam below 1, such as 0.95, or model.critic.target to null"
        )
    if critic.target is not None and dtype == "bfloat16" and not adapters and critic.target.small_steps:
        raise SettingError(
            f"model.dtype is bfloat16, which rounds away the small steps of model.critic.target (polyak "
            f"{critic.target.polyak:g}, momentum {critic.target.momentum:g}); set model.dtype to float32, or polyak to "
            "1, momentum to 0 and every above 1, such as 100"
        )
    if critic.head.sigma_floor is not None and advantage.whitens:
        raise SettingError(
            f"model.critic.head.sigma_floor is {critic.head.sigma_floor} and model.advantage.whiten is true, but both "
            "give advantages their unit; set whiten to false, or sigma_floor to null"
        )
