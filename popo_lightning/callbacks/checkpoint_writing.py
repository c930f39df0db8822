"""Writes a checkpoint to the disk, or says why that failed."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import CheckpointException

from popo_lightning.callbacks.resume_place import ResumePlace
from popo_lightning.core.errors import reason
from popo_lightning.core.ranks import broadcast_object
from popo_lightning.runs.checkpoint_files import draft_for, finish_folder
from popo_lightning.training.optimizers import UNSTEPPED, left_as_they_are


class NotSavedError(Exception):
    """Raised if a checkpoint was not written, with the reason; the run continues."""

    def __init__(self, checkpoint: str, why: str) -> None:
        self.why = why
        super().__init__(f"checkpoint {checkpoint} is not written: {why}")


def contents(trainer: L.Trainer, place: ResumePlace | None, weights_only: bool, own_key: str) -> dict[str, Any]:
    """Makes a checkpoint, and leaves the optimizers as they are. A collective.

    Args:
        trainer: Trainer of this rank.
        place: Place of the run that it describes; None for the present one.
        weights_only: Lightning's setting of that name.
        own_key: Key of the callback that saves.
    """
    with left_as_they_are(trainer) as unstepped:
        if place is None:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        else:
            checkpoint = place.dump(trainer, weights_only, own_key)
    return checkpoint | ({UNSTEPPED: unstepped} if unstepped and not weights_only else {})


def write_folder(trainer: L.Trainer, checkpoint: dict[str, Any], target: Path) -> str | None:
    """Writes the shards of all ranks to a draft and moves it into place. Returns why it cannot be made, or None."""
    first = trainer.is_global_zero
    with draft_for(target) if first else nullcontext(target) as draft:
        if (why := broadcast_object(made(draft) if first else None)) is not None:
            return why
        trainer.strategy.save_checkpoint(checkpoint, draft)  # the path of rank 0 counts
        if first:
            finish_folder(draft, target)
    return None


def made(folder: Path) -> str | None:
    """Makes a folder. Returns the reason if it cannot be made, else None."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return words(error)
    return None


def words(error: BaseException) -> str:
    """The reason on one line, such as "No space left on device" for a full disk."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({os.fsdecode(error.filename)})" if error.filename else "")
    return f"{type(error).__name__} ({reason(error)})" if isinstance(error, Exception) else type(error).__name__


def keeps_none(kept: ModelCheckpoint) -> bool:
    """Whether the settings keep no checkpoint at all."""
    return kept.save_top_k == 0 and not kept.save_last


def only_tries(trainer: L.Trainer) -> bool:
    """Whether the run is a fast_dev_run, which writes nothing."""
    return bool(vars(trainer).get("fast_dev_run"))


def is_last(trainer: L.Trainer) -> bool:
    """Whether the iteration that ends is the run's last."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    done, most = progress.processed, trainer.max_epochs
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    return bool(trainer.should_stop or by_steps or (most is not None and 0 <= most <= done))
