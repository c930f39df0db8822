"""Numbers and tensors over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor


def over_ranks(trainer: L.Trainer, value: float, operation: str) -> float:
    """The sum or max of a number over all ranks. A collective."""
    # on the device: NCCL reduces nothing else; in float64: token counts are exact there
    tensor = torch.tensor(float(value), dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op=operation))


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat (N,) CPU tensors, N differing by rank, each joined over all ranks in their order. A collective."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(tensors)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, list(tensors))
    return [torch.cat(parts) for parts in zip(*ranks, strict=True)]
