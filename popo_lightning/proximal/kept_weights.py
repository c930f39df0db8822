"""Copies of the trained weights that a callback keeps beside the policy's own."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from popo_lightning.core.errors import SettingError

Weights = dict[str, Tensor]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model: nn.Module) -> Weights:
    """Copies of the trained weights as they are now."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


@torch.no_grad()
def restore(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Writes copies into the model, in place: optimizer and wrappers go on holding the same parameters."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def refuse_sharded(trainer: L.Trainer, setting: str) -> None:
    """Raises SettingError where a rank holds only a part of the weights: a checkpoint would keep rank 0's part.

    Args:
        trainer: Whose strategy.
        setting: The setting that needs whole weights, and its value.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise SettingError(
            f"{setting} copies whole weights, but trainer.strategy {type(trainer.strategy).__name__} splits them; use "
            "trainer.strategy ddp or another rule"
        )
