"""What callbacks read of a run's data: the minibatches of the present iteration, and its clock."""

from __future__ import annotations

from typing import Protocol, cast

import lightning as L

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.timing import PhaseClock


class RunData(Protocol):
    """The part of RolloutDataModule that rules read.

    Attributes:
        clock: Seconds by phase of the iteration.
        pending: Minibatches of the iteration that are still to come.
        minibatches: Optimizer steps per epoch.
        ppo_epochs: Number of times that an iteration's groups are trained on.
        steps: Optimizer steps per iteration.
    """

    clock: PhaseClock
    pending: list[Minibatch]
    minibatches: int
    ppo_epochs: int

    @property
    def steps(self) -> int: ...  # noqa: D102


def data_module(trainer: L.Trainer) -> L.LightningDataModule:
    """The data module of a trainer, which Lightning's annotations leave out."""
    found: L.LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return found


def run_data(trainer: L.Trainer) -> RunData:
    """What rules read of a trainer's data module."""
    return cast(RunData, data_module(trainer))
