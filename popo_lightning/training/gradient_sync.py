"""When ranks reduce gradients: once per optimizer step, with its last backward pass, if the strategy allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from popo_lightning.core.errors import SettingError
from popo_lightning.core.ranks import all_reduce
from popo_lightning.model.padded_rows import PaddedRows, one_token
from popo_lightning.training.minibatch_loss import MinibatchLoss

GRADIENT_SYNC = ("step", "micro_batch")


def check_gradient_sync(gradient_sync: str) -> None:
    """Raises SettingError for a moment that does not exist."""
    if gradient_sync not in GRADIENT_SYNC:
        raise SettingError(f"model.gradient_sync is '{gradient_sync}'; use {' or '.join(GRADIENT_SYNC)}")


def add_up_gradients(policy: Any, losses: MinibatchLoss, parts: Sequence[PaddedRows]) -> None:
    """One forward and one backward pass a micro-batch, and the gradients of all ranks after the last.

    Micro-batches without a gradient come first, and have no backward pass.

    Args:
        policy: The PolicyModule.
        losses: Of the minibatch.
        parts: This rank's micro-batches.
    """
    silent: list[PaddedRows] = []
    teaching: list[PaddedRows] = []
    for part in parts:
        (silent if losses.is_silent(part) else teaching).append(part)
    if silent and not teaching:
        teaching.append(silent.pop())  # gradients of 0 are not none: an optimizer moves on by its momentum
    with torch.no_grad():
        for number in range(_most(policy, len(silent))):
            losses.add(silent[number]) if number < len(silent) else _nothing(policy)
    models = [policy.model] if policy.critic is None else [policy.model, policy.value_model]
    waits = policy.trainer.world_size > 1 and not policy.sharded  # the last adds up the gradients of all ranks
    passes = _most(policy, max(len(teaching), waits))
    for number in range(passes):
        exchange = number == passes - 1 or policy.gradient_sync == "micro_batch"
        with gradients_exchanged(policy.trainer.strategy.model, models, exchange):
            loss = losses.add(teaching[number]) if number < len(teaching) else _nothing(policy)
            policy.manual_backward(loss)


def _most(policy: Any, own: int) -> int:
    """Passes of this rank, which has so many of its own; those beyond go through the model with nothing."""
    # Sharded, each gathers weights from all ranks. Asked before the first of them, or a rank that is through would wait
    # here for one that waits there.
    return int(all_reduce(policy.trainer, own, "max")) if policy.sharded else own


def _nothing(policy: Any) -> Tensor:
    """A loss of zero that has been through the whole model."""
    rows = one_token().to(policy.device)
    logp, _ = policy(rows)
    if policy.sharded:
        policy.reference_logprobs(rows)
    nothing: Tensor = logp.sum() * 0
    return nothing if policy.critic is None else nothing + policy.value_model(rows).sum() * 0


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
