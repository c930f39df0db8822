"""A training without iterations left still begins and ends: its last evaluation and its summary may be missing."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop


class WholeFitLoop(_FitLoop):
    """Lightning's, which calls neither on_train_start nor on_train_end where a checkpoint has all iterations."""

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0


def end_always(trainer: L.Trainer) -> None:
    """Gives a trainer that loop."""
    trainer.fit_loop.__class__ = WholeFitLoop
