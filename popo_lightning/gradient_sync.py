"""When ranks exchange gradients: once an optimizer step, with its last backward pass, where the strategy allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from popo_lightning.errors import SettingError

GRADIENT_SYNC = ("step", "micro_batch")


def check_gradient_sync(gradient_sync: str) -> None:
    """Raises SettingError for a moment that does not exist."""
    if gradient_sync not in GRADIENT_SYNC:
        raise SettingError(f"model.gradient_sync is '{gradient_sync}'; use {' or '.join(GRADIENT_SYNC)}")


@contextmanager
def gradients_exchanged(wrapped: nn.Module | None, models: Sequence[nn.Module], exchange: bool) -> Iterator[None]:
    """A forward and a backward pass within it adds its gradients up over the ranks, or keeps them on its own.

    Gradients that were kept are added up with the next ones that are not.

    Args:
        wrapped: The strategy's model: DistributedDataParallel where each rank has the whole model.
        models: The trained models: split ones are told one by one.
        exchange: Whether to add up.
    """
    for model in models:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(exchange)
    kept = isinstance(wrapped, DistributedDataParallel) and not exchange
    with wrapped.no_sync() if kept else nullcontext():  # type: ignore[operator,union-attr]
        yield


def free_gradients(optimizer: Any, wrapped: nn.Module | None) -> None:
    """Frees the gradients, or clears them where they are parts of buckets that are kept anyway.

    Without any, the next passes would make new ones beside DistributedDataParallel's buckets: another 4 bytes a
    parameter.

    Args:
        optimizer: Over their parameters.
        wrapped: The strategy's model.
    """
    in_buckets = isinstance(wrapped, DistributedDataParallel) and wrapped.gradient_as_bucket_view
    optimizer.zero_grad(set_to_none=not in_buckets)
