"""Skips and counts optimizer steps that would break the policy, and ends the run after several in a row."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import DIVERGED_REMEDY, NotFiniteError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.ranks import all_reduce

log = logging.getLogger(__name__)


class FiniteSteps:
    """Decides for all ranks together whether a step is taken, and ends a run after too many skipped steps.

    A skipped step changes neither weights, optimizer and scheduler nor anything that follows the weights.

    Args:
        limit: Number of consecutive skipped steps that ends the run.

    Attributes:
        in_a_row: Number of steps skipped since the last one taken; part of the checkpoint.

    Raises:
        SettingError: The limit is below 1.
    """

    def __init__(self, limit: int) -> None:
        self.limit = at_least("model.max_skipped_steps", limit, 1, " step, such as 3")
        self.in_a_row = 0
        self._said = False

    def allows(self, trainer: L.Trainer, minibatch: Minibatch, numbers: Mapping[str, float]) -> bool:
        """Returns whether the step is taken: only if all numbers are finite on all ranks. A collective.

        Args:
            trainer: Trainer of this rank.
            minibatch: Minibatch of the step, for the message.
            numbers: The step's losses and gradient norms on this rank, by name.

        Raises:
            NotFiniteError: Too many steps in a row have been skipped.
        """
        bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if not all_reduce(trainer, bool(bad), "max"):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        found = ", ".join(f"{name} {value}" for name, value in bad.items()) or "a loss of another rank"
        if not self._said:
            log.warning(
                "skipped the optimizer step of %s on all ranks: %s; train/skipped_steps counts further ones, and %d in "
                "a row end the run",
                place(minibatch),
                found,
                self.limit,
            )
            self._said = True
        if self.in_a_row >= self.limit:
            raise NotFiniteError(
                f"{self.in_a_row} optimizer steps in a row were not finite (model.max_skipped_steps {self.limit}), the "
                f"last that of {place(minibatch)} ({found}); {DIVERGED_REMEDY}"
            )
        return False

    def check_weights(self, trainer: L.Trainer, minibatch: Minibatch, weights: Iterable[Tensor], split: bool) -> None:
        """Ends a run whose last step broke the weights, for example by too large a learning rate.

        Args:
            trainer: Trainer of this rank.
            minibatch: Minibatch of the step, for the message.
            weights: Trained weights.
            split: Whether the weights are sharded over the ranks; then this is a collective.

        Raises:
            NotFiniteError: A weight is not finite.
        """
        broken = not all_finite(weights)
        if all_reduce(trainer, broken, "max") if split else broken:
            raise NotFiniteError(
                f"the optimizer step of {place(minibatch)} made weights that are not finite; {DIVERGED_REMEDY}"
            )


def place(minibatch: Minibatch) -> str:
    """Names a minibatch by its iteration and its number in it, both counted from 1."""
    return f"iteration {minibatch.version + 1}, minibatch {minibatch.index + 1}"


def optimizer_state(optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    """Yields the tensors that optimizers keep for each parameter, such as Adam's moments."""
    for optimizer in optimizers:
        for of_parameter in optimizer.state.values():
            yield from (value for value in of_parameter.values() if isinstance(value, Tensor))


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether all numbers in this rank's shards of the tensors are finite. Reads them once, without a copy."""
    local = [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in local:
        if tensor.numel() and tensor.is_floating_point():
            by_device.setdefault(tensor.device, []).append(tensor)
    largest = [torch.stack([n.float() for n in torch._foreach_norm(ts, math.inf)]) for ts in by_device.values()]
    return all(bool(norms.isfinite().all()) for norms in largest)
