"""The gradients of a step: reduced over ranks once, in its last backward pass, if the strategy allows it; clipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import inf

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from popo_lightning.core.ranks import all_reduce, full_tensor
from popo_lightning.model.padded_rows import PaddedRows, dummy_rows
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.training.minibatch_loss import MinibatchLoss


def add_up_gradients(policy: PolicyModel, losses: MinibatchLoss, parts: Sequence[PaddedRows]) -> None:
    """Runs one forward and one backward pass per micro-batch, and reduces gradients over ranks after the last.

    Micro-batches without a gradient come first, and have no backward pass.

    Args:
        policy: Policy that gets the gradients.
        losses: Loss of the minibatch.
        parts: This rank's micro-batches.
    """
    silent: list[PaddedRows] = []
    teaching: list[PaddedRows] = []
    for part in parts:
        (silent if losses.is_silent(part) else teaching).append(part)
    if silent and not teaching:
        teaching.append(silent.pop())  # gradients of 0 differ from None: the optimizer moves by its momentum
    with torch.no_grad():
        for number in range(_most(policy, len(silent))):
            losses.add(silent[number], policy.run(silent[number])) if number < len(silent) else _zero_loss(policy)
    models = [policy.model] if policy.critic is None else [policy.model, policy.value_model]
    waits = policy.trainer.world_size > 1 and not policy.sharded  # the last pass reduces gradients over all ranks
    passes = _most(policy, max(len(teaching), waits))
    for number in range(passes):
        early = policy.sharded and policy.gradient_sync == "micro_batch"  # under DDP ranks make unequal passes
        exchange = early or number == passes - 1
        with gradients_exchanged(policy.trainer.strategy.model, models, exchange):
            if number < len(teaching):
                loss = losses.add(teaching[number], policy.run(teaching[number]))
            else:
                loss = _zero_loss(policy)
            policy.manual_backward(loss)


def add_up_critic_gradients(policy: PolicyModel, losses: MinibatchLoss, parts: Sequence[PaddedRows]) -> None:
    """Runs the critic's own passes. Gradients stay on their rank until :func:`add_up_gradients` reduces them.

    Args:
        policy: Policy with the critic. Weights must not be sharded, because ranks may have different numbers of parts.
        losses: Loss of the minibatch.
        parts: This rank's micro-batches.
    """
    for part in parts:
        rows = part.to(policy.device)
        with gradients_exchanged(policy.trainer.strategy.model, [policy.value_model], False):
            policy.manual_backward(losses.add_values(rows, policy.value_model(rows)))


def _most(policy: PolicyModel, own: int) -> int:
    """Returns the number of passes of this rank, of which `own` have rows and the rest have none."""
    # With sharded weights each pass gathers weights from all ranks, so all need equally many. Ranks agree before the
    # first pass; otherwise a rank that has finished would wait here for one that waits in a pass.
    return int(all_reduce(policy.trainer, own, "max")) if policy.sharded else own


def _zero_loss(policy: PolicyModel) -> Tensor:
    """Computes a loss of zero through the whole model."""
    found = policy.run(dummy_rows())
    nothing = found.logp.sum() * 0
    return nothing if found.values is None else nothing + found.values.sum() * 0


@contextmanager
def gradients_exchanged(wrapped: nn.Module | None, models: Sequence[nn.Module], exchange: bool) -> Iterator[None]:
    """Context in which a forward and a backward pass reduce gradients over the ranks, or keep them on their rank.

    Kept gradients are reduced together with the next ones that are reduced.

    Args:
        wrapped: The strategy's model: DistributedDataParallel if each rank has the whole model.
        models: The trained models; each sharded one is set separately.
        exchange: Whether to reduce gradients.
    """
    for model in models:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(exchange)
    kept = isinstance(wrapped, DistributedDataParallel) and not exchange
    with wrapped.no_sync() if kept else nullcontext():  # type: ignore[operator,union-attr]
        yield


def clip_gradients(model: nn.Module, limit: float | None) -> float:
    """Clips a model's gradients to a norm, or not at all for None. Returns their norm before clipping."""
    return float(full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), inf if limit is None else limit)))


def free_gradients(optimizer: Optimizer | LightningOptimizer, wrapped: nn.Module | None) -> None:
    """Frees the gradients, or sets them to zero if they are views of buckets, which stay allocated anyway.

    If such views were freed, the next passes would make new gradients in addition to DistributedDataParallel's buckets,
    another 4 bytes per parameter.

    Args:
        optimizer: Optimizer of the parameters.
        wrapped: The strategy's model.
    """
    in_buckets = isinstance(wrapped, DistributedDataParallel) and wrapped.gradient_as_bucket_view
    optimizer.zero_grad(set_to_none=not in_buckets)
