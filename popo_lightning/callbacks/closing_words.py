"""What a run says of its checkpoints when it ends: which one to take up, and what became of the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from popo_lightning.callbacks.health import Health
from popo_lightning.core.errors import NothingSavedError, SettingError
from popo_lightning.core.trainer_callbacks import callback_of
from popo_lightning.runs.checkpoint_files import flaw
from popo_lightning.runs.folder import read_checkpoint
from popo_lightning.runs.record import RunRecord
from popo_lightning.runs.resume import same


@dataclass
class SavedSoFar:
    """What became of a run's checkpoints.

    Args:
        newest: That this process has written, or goes on from; None without any.
        where: The last thing that is in it, in words; "" where this process has not written it.
        written: Checkpoints that this process has written.
        failed: Those that it could not.
        why: Reason of the last failure.
        of_the_end: Whether the newest holds the last place of the run.
        off: Whether none is to be written.
        weights_only: Whether they hold weights alone.
    """

    newest: str | None
    where: str
    written: int
    failed: int
    why: str
    of_the_end: bool
    off: bool
    weights_only: bool

    @property
    def unusable(self) -> str:
        """Why training cannot go on from what is saved, as a clause; "" where it can."""
        if self.newest is None and self.off:
            return "nothing is saved, as checkpoint.save_top_k is 0"
        if self.newest is None and self.failed:
            return f"no checkpoint could be written ({self.why})"
        if self.written and self.weights_only:
            return (
                f"{self.newest} holds its weights alone (checkpoint.save_weights_only), which can be evaluated, and "
                "which training cannot go on from"
            )
        return ""

    def taken_up(self) -> str:
        """How to go on after an end that nobody asked for, as a sentence."""
        if self.newest is None or self.unusable:
            return self.unusable or "nothing was saved before that"
        after = f", after {self.where}" if self.where else ""
        return f"--run.resume true takes up the newest checkpoint, {self.newest}{after}; --ckpt_path an earlier one"

    def failures(self) -> str | None:
        """Of writing, as a sentence; None without any."""
        if not self.failed:
            return None
        tried = self.failed + self.written
        said = f"{self.failed} of {tried} checkpoints could not be written, the last for this reason: {self.why}"
        if self.newest is None:
            return said
        after = f", after {self.where}" if self.where else ", which the run went on from"
        end = "" if self.of_the_end else "; none holds the end of the run"
        return f"{said}; the newest is {self.newest}{after}{end}"


def check_saved(saved: SavedSoFar, record: RunRecord, folder: Path) -> None:
    """Raises for a run that is over and leaves nothing to go on from, though it was to.

    Args:
        saved: Of the run.
        record: Of the run.
        folder: The run's.

    Raises:
        NothingSavedError: None of its checkpoints could be written.
    """
    origin = record.origin
    of_another = origin is not None and saved.newest is not None and same(saved.newest, origin["checkpoint"])
    if saved.failed and (saved.newest is None or of_another):
        raise NothingSavedError(
            f"{saved.failures()}; the numbers in '{folder}' are all that is left of this run; make room, or name a "
            "folder by checkpoint.dirpath, and start it again"
        )


def fall_in_words(trainer: L.Trainer, newest: str | None) -> str | None:
    """Which checkpoint is from before the policy broke, as a sentence; None where it did not.

    Args:
        trainer: With its callbacks.
        newest: The newest checkpoint; None without any.
    """
    health = callback_of(trainer, Health)
    if health is None or not health.fall.certain or newest is None:
        return None
    since, limit = health.fall.since, sound_iterations(trainer, health)
    if (begun := iterations_in(Path(newest))) is not None and begun <= limit:
        return f"no response has been right since iteration {since}; {newest} is from before that"
    before = last_sound(newest, trainer.ckpt_path, limit)
    left = (
        f"before it: {before}, which --ckpt_path takes up"
        if before
        else "none from before it is left (checkpoint.save_top_k -1 keeps all)"
    )
    return f"no response has been right since iteration {since}; the newest, {newest}, is from after that; {left}"


def from_before_a_fall(trainer: L.Trainer, checkpoint: str) -> bool:
    """Whether a checkpoint may be the last sound one: the policy may be broken, and was not yet when it was written.

    Args:
        trainer: With its callbacks.
        checkpoint: About to be removed.
    """
    health = callback_of(trainer, Health)
    if health is None or not health.fall.suspected:
        return False
    begun = iterations_in(Path(checkpoint))
    return begun is not None and begun <= sound_iterations(trainer, health)


def sound_iterations(trainer: L.Trainer, health: Health) -> int:
    """Iterations after which the policy was certainly not broken yet."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return health.fall.sound_iterations(data.async_level + data.weight_sync_interval - 1)


def last_sound(newest: str, began_from: Any, limit: int) -> str | None:
    """The newest of a folder's whole checkpoints with at most so many iterations behind it, or the one begun from.

    Args:
        newest: One of the folder.
        began_from: The checkpoint that the run went on from, or None.
        limit: Iterations.
    """
    found = [*Path(newest).parent.glob("*.ckpt"), *([Path(str(began_from))] if began_from else [])]
    counts = {path: iterations_in(path) for path in found if flaw(path) is None}
    sound = {path: count for path, count in counts.items() if count is not None and count <= limit}
    return str(max(sound, key=lambda path: sound[path])) if sound else None


def iterations_in(checkpoint: Path) -> int | None:
    """Iterations that a checkpoint has behind it, one that has begun among them; None where it cannot be read."""
    try:
        return int(read_checkpoint(checkpoint)["RolloutDataModule"]["iteration"])
    except (SettingError, KeyError):
        return None
