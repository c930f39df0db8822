"""Makes a training without remaining iterations still begin and end, for its last evaluation and its summary."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop


class WholeFitLoop(_FitLoop):
    """Lightning's fit loop, but it calls on_train_start and on_train_end even if a checkpoint has all iterations."""

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0


def end_always(trainer: L.Trainer) -> None:
    """Gives a trainer this loop."""
    trainer.fit_loop.__class__ = WholeFitLoop
