"""A checkpoint written to the disk, or the reason why it could not be."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import CheckpointException

from popo_lightning.core.errors import reason
from popo_lightning.core.ranks import broadcast_object
from popo_lightning.runs.checkpoint_files import draft_for, finish_folder


class NotSavedError(Exception):
    """A checkpoint that was not written; the run goes on.

    Args:
        checkpoint: Its path.
        why: The reason.
    """

    def __init__(self, checkpoint: str, why: str) -> None:
        self.why = why
        super().__init__(f"checkpoint {checkpoint} is not written: {why}")


def write_folder(trainer: L.Trainer, checkpoint: dict[str, Any], target: Path) -> str | None:
    """Shards of all ranks, in a folder that comes to its place when all are written. Why it cannot be made, or None."""
    first = trainer.is_global_zero
    with draft_for(target) if first else nullcontext(target) as draft:
        if (why := broadcast_object(made(draft) if first else None)) is not None:
            return why
        trainer.strategy.save_checkpoint(checkpoint, draft)  # rank 0 says where
        if first:
            finish_folder(draft, target)
    return None


def made(folder: Path) -> str | None:
    """Makes a folder; the reason why it cannot be, or None."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return words(error)
    return None


def words(error: BaseException) -> str:
    """A reason on one line: of a full disk "No space left on device"."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({os.fsdecode(error.filename)})" if error.filename else "")
    return f"{type(error).__name__} ({reason(error)})" if isinstance(error, Exception) else type(error).__name__


def keeps_none(kept: ModelCheckpoint) -> bool:
    """Whether its settings leave no checkpoint at all."""
    return kept.save_top_k == 0 and not kept.save_last


def only_tries(trainer: L.Trainer) -> bool:
    """Whether it is a fast_dev_run, which leaves nothing behind."""
    return bool(vars(trainer).get("fast_dev_run"))


def is_last(trainer: L.Trainer) -> bool:
    """Whether the iteration that ends is the run's last."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    done, most = progress.processed, trainer.max_epochs
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    return bool(trainer.should_stop or by_steps or (most is not None and 0 <= most <= done))
