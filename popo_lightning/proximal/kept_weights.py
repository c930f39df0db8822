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
    """Returns the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model: nn.Module) -> Weights:
    """Returns copies of the trained weights as they are now."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


@torch.no_grad()
def restore(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Writes copies into the model in place, so that optimizer and wrappers keep the same parameters."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def refuse_sharded(trainer: L.Trainer, setting: str) -> None:
    """Raises SettingError if weights are sharded over ranks, because a checkpoint would keep only rank 0's shard.

    Args:
        trainer: Trainer whose strategy is checked.
        setting: Name and value of the setting that needs whole weights.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise SettingError(
            f"{setting} copies whole weights, but trainer.strategy {type(trainer.strategy).__name__} splits them; use "
            "trainer.strategy ddp or another rule"
        )
