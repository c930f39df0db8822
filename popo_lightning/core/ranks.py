"""Reductions and gathers of numbers and tensors over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from popo_lightning.core.errors import SettingError

T = TypeVar("T")
HOST_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()  # by default group


def all_reduce(trainer: L.Trainer, value: float, operation: str) -> float:
    """The sum or max of a number over all ranks. A collective."""
    # on the device, since NCCL reduces nothing else; in float64, where token counts are exact
    tensor = torch.tensor(float(value), dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op=operation))


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def part_of_rank(rank: int, ranks: int) -> str:
    """Suffix of a rank's own file, such as ".rank0-of-2"; empty for a single rank."""
    return "" if ranks == 1 else f".rank{rank}-of-{ranks}"


def other_number(saved: int, ranks: int, why: str, otherwise: str = "") -> SettingError:
    """The refusal to resume with another number of ranks.

    Args:
        saved: Number of ranks that wrote the checkpoint.
        ranks: Number of ranks of the resumed run.
        why: Why what the checkpoint holds cannot be redistributed, as a clause.
        otherwise: Another remedy.
    """
    return SettingError(
        f"the checkpoint was written by {saved} ranks and this run has {ranks}, but {why}; resume with as many "
        f"(trainer.devices x trainer.num_nodes){otherwise}"
    )


def joined() -> bool:
    """Whether there is a process group, even one of a single process, as with DDP on one device."""
    return dist.is_initialized()


def lost_rank(error: RuntimeError) -> bool:
    """Whether the error comes from a collective with a dead peer. NCCL's has its own class, gloo's only its text."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a DTensor (a collective); returns any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_gather_object(value: T) -> list[T]:
    """Gathers a plain value of every rank on every rank, in rank order. A collective."""
    if not is_distributed():
        return [value]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, value)
    return ranks


def broadcast_object(value: T) -> T:
    """Returns rank 0's plain value on every rank. A collective."""
    if not is_distributed():
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def gather_object(value: T) -> list[T]:
    """Gathers plain values of every rank on rank 0, in host memory; other ranks get only their own. A collective."""
    if not is_distributed():
        return [value]
    ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, ranks, group=_host_group())
    return [value] if ranks is None else ranks


def _host_group() -> dist.ProcessGroup:
    """The group of all ranks whose collectives use host memory. The first call makes it, a collective.

    NCCL would put the values of all ranks into a GPU's memory, each padded to the largest.
    """
    default = dist.group.WORLD
    assert default is not None, "the ranks are joined"
    if dist.get_backend() != dist.Backend.NCCL:
        return default
    if default not in HOST_GROUPS:
        HOST_GROUPS[default] = dist.new_group(backend=dist.Backend.GLOO)
    return HOST_GROUPS[default]


def all_gather_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Joins flat (N,) CPU tensors of every rank, in rank order; N may differ by rank. A collective."""
    return [torch.cat(parts) for parts in zip(*all_gather_object(list(tensors)), strict=True)]
