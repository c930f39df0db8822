"""Sentences that end a run: what became of its checkpoints, and which one to use."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from popo_lightning.callbacks.checkpoints import Checkpoints
from popo_lightning.callbacks.closing_words import check_saved
from popo_lightning.runs.record import RunRecord


def closing_sentences(trainer: L.Trainer, record: RunRecord, folder: Path) -> list[str]:
    """Sentences about checkpoints at the end of a run.

    Args:
        trainer: Trainer that has ended.
        record: Record of the run.
        folder: Folder of the run.

    Raises:
        NothingSavedError: The run leaves nothing to resume from.
    """
    found: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoints) and trainer.is_global_zero:
            check_saved(callback.saved_so_far(trainer), record, folder)
            found += callback.closing_words(trainer)
    return found
