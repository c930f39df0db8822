"""The critic: values of a response's states, for advantages that need them (PPO)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from popo_lightning.core.bounds import above, at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.ranks import full_tensor
from popo_lightning.model.padded_rows import PaddedRows
from popo_lightning.model.scoring import placed, response_states
from popo_lightning.objectives.advantages import Advantage


class Critic:
    """A value model beside the policy, trained by the same optimizer in its own parameter group.

    It starts as a copy of the policy without its output head, because reward models of the right size are rare. Its
    linear head starts at 0, so the first advantages are the rewards themselves. PPO, arXiv 1707.06347; the defaults are
    verl's.

    Cost: a second model with its gradients and optimizer state, one forward pass without gradient over every minibatch,
    and one with gradient. The checkpoint holds it like the policy.

    Args:
        lr: Learning rate of the value model. All other settings of model.optimizer apply to both models.
        value_clip: Distance from the recorded value beyond which a value gets no gradient to move farther; null for no
            bound.
        max_grad_norm: Gradient-clipping norm of the value model, apart from the policy's; null disables clipping.
    """

    def __init__(self, lr: float = 1e-5, value_clip: float | None = 0.5, max_grad_norm: float | None = 1.0) -> None:
        self.lr = at_least("Critic.lr", lr, 0, ", such as 1e-5")
        self.value_clip = None if value_clip is None else above("Critic.value_clip", value_clip, 0, "0.5, or null")
        self.max_grad_norm = (
            None if max_grad_norm is None else above("Critic.max_grad_norm", max_grad_norm, 0, "1.0, or null")
        )

    def build(self, model: Any) -> ValueModel:
        """The value model of a policy, as transformers loaded it."""
        return ValueModel(model)

    def clip_gradients(self, value_model: nn.Module) -> float:
        """Scales the value model's gradients down to `max_grad_norm`; returns their norm before."""
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return float(full_tensor(torch.nn.utils.clip_grad_norm_(value_model.parameters(), limit)))

    def loss(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, denominator: float) -> Tensor:
        """`value_loss` with these settings."""
        return value_loss(values, old_values, returns, mask, self.value_clip, denominator)


class ValueModel(nn.Module):
    """A language model without its output head, and a linear head that gives one number per position.

    Args:
        model: The policy. Its base model is copied, including frozen parameters and gradient checkpointing.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base = copy.deepcopy(model.base_model)
        # always float32: bfloat16 would round away steps of 1e-5 on weights that start at 0
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.training = model.training

    def forward(self, rows: PaddedRows) -> Tensor:
        """Value of the state before each response token.

        Args:
            rows: R padded rows on this module's device.

        Returns:
            (R, T) float32, aligned with `rows.mask` and 0 at padding.
        """
        states = response_states(self.base, rows)
        with torch.autocast(states.device.type, enabled=False):
            return placed(self.head(states.float()).squeeze(-1), rows.mask)


def first_weights(model: Any) -> dict[str, Tensor]:
    """The weights by name that the value model of a policy starts with; those of its base are the policy's own."""
    base: Any = model.base_model
    found = {f"base.{name}": parameter.detach() for name, parameter in base.named_parameters()}
    hidden = model.config.get_text_config().hidden_size
    return found | {"head.weight": torch.zeros(1, hidden), "head.bias": torch.zeros(1)}


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip: float | None,
    denominator: float | Tensor,
) -> Tensor:
    """Squared error of the values, with the bound on their movement that PPO's implementations share.

        sum over tokens of 0.5 max((V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2) / denominator

    Args:
        values: (R, T), with gradient.
        old_values: (R, T), recorded.
        returns: (R, T).
        mask: (R, T), true at response tokens; anything may stand elsewhere.
        value_clip: c, or None.
        denominator: Response tokens of the whole minibatch, over its micro-batches and ranks.
    """
    mask = mask.bool()
    # Cleared before the squares: what stands at padding must not reach the backward pass, not even as NaN.
    values, old_values, returns = (torch.where(mask, each, 0.0) for each in (values, old_values, returns))
    error = (values - returns) ** 2
    if value_clip is not None:
        bounded = torch.clamp(values, old_values - value_clip, old_values + value_clip)
        error = torch.maximum(error, (bounded - returns) ** 2)
    return 0.5 * error.sum() / denominator


def check_critic(critic: Critic | None, advantage: Advantage) -> None:
    """Raises SettingError where an advantage lacks its critic, or a critic would be trained for nothing."""
    name = type(advantage).__name__
    if advantage.needs_values and critic is None:
        raise SettingError(
            f"model.advantage is {name}, which needs a critic's values, but model.critic is null; set it to "
            "popo_lightning.model.critic.Critic"
        )
    if critic is not None and not advantage.needs_values:
        raise SettingError(
            f"model.critic is set but model.advantage is {name}, which uses no values; leave the critic out, or choose "
            "popo_lightning.objectives.generalised_advantage.GAE"
        )
