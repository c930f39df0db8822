"""Checkpoints of an optimizer that has taken no step, and so has no state.

To save or load a sharded optimizer without state, torch first makes one by a step with gradients of zero
(`torch.distributed.checkpoint.state_dict`). That step would count: Adam's next update would be its second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from popo_lightning.training.optimizers import group_settings

UNSTEPPED = "optimizers_without_state"  # indices; what the checkpoint holds of them has no meaning


@contextmanager
def left_as_they_are(trainer: L.Trainer) -> Iterator[list[int]]:
    """Context for saving, after which optimizers without state have none again, the same settings and random numbers.

    Torch sets their learning rate to 0 meanwhile, so weights do not move.

    Args:
        trainer: Trainer of this rank.

    Yields:
        Indices of these optimizers, the checkpoint's UNSTEPPED.
    """
    without = {index: each for index, each in enumerate(trainer.optimizers) if not each.state}
    settings = {index: group_settings(each) for index, each in without.items()}
    device = trainer.strategy.root_device
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, enabled=bool(without)):
            yield list(without)
    finally:
        for index, optimizer in without.items():
            optimizer.state.clear()
            for group, own in zip(optimizer.param_groups, settings[index], strict=True):
                for name in group.keys() - own.keys() - {"params"}:
                    del group[name]
                group.update(own)


def clear_unstepped(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Gives the optimizers that had no state when a checkpoint was written none.

    Args:
        trainer: Trainer that resumes. FSDP2 has already loaded its optimizers, other strategies load them afterwards.
        checkpoint: The checkpoint; its optimizer states are changed.
    """
    states = checkpoint.get("optimizer_states", [])
    for index in checkpoint.get(UNSTEPPED, []):
        for optimizer in trainer.optimizers[index : index + 1]:
            optimizer.state.clear()
        for state in states[index : index + 1]:
            state["state"] = {}
