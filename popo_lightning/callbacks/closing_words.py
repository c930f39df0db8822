"""Sentences about checkpoints when a run ends: which one to resume from, and what became of the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from popo_lightning.callbacks.health import Health
from popo_lightning.core.errors import SettingError
from popo_lightning.core.trainer_callbacks import callback_of
from popo_lightning.rollout.engine_rollouts import rollouts_of
from popo_lightning.runs.checkpoint_files import flaw
from popo_lightning.runs.folder import read_checkpoint


@dataclass
class SavedSoFar:
    """What became of a run's checkpoints.

    Args:
        newest: Newest checkpoint that this process wrote, else the one it resumed from; None if there is none.
        where: Place in the run that the newest was saved at, in words; "" if this process did not write it.
        written: Number of checkpoints that this process wrote.
        failed: Number of checkpoints that could not be written.
        why: Reason of the last failure.
        of_the_end: Whether the newest holds the last place of the run.
        off: Whether the settings keep no checkpoint.
        weights_only: Whether checkpoints hold only weights.
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
        """Why no run can resume from what is saved, as a clause; "" if one can."""
        if self.newest is None and self.off:
            return "nothing is saved, as checkpoint.save_top_k is 0"
        if self.newest is None and self.failed:
            return f"no checkpoint could be written ({self.why})"
        if self.written and self.weights_only:
            return (
                f"{self.newest} holds its weights alone (checkpoint.save_weights_only), which can be evaluated but not "
                "resumed"
            )
        return ""

    def how_to_resume(self) -> str:
        """How to resume after an unrequested end, as a sentence."""
        if self.newest is None or self.unusable:
            return self.unusable or "nothing was saved before that"
        after = f", after {self.where}" if self.where else ""
        newest = f"{self.newest}{after}"
        return f"--run.resume true resumes from the newest checkpoint, {newest}; --ckpt_path from an earlier one"

    def failures(self) -> str | None:
        """Says how many checkpoints could not be written, as a sentence; None if all were."""
        if not self.failed:
            return None
        tried = self.failed + self.written
        said = f"{self.failed} of {tried} checkpoints could not be written, the last for this reason: {self.why}"
        if self.newest is None:
            return said
        after = f", after {self.where}" if self.where else ", which the run resumed from"
        end = "" if self.of_the_end else "; none holds the end of the run"
        return f"{said}; the newest is {self.newest}{after}{end}"


def fall_in_words(trainer: L.Trainer, newest: str | None) -> str | None:
    """Says which checkpoint is from before the policy broke, as a sentence; None if it did not break."""
    health = callback_of(trainer, Health)
    if health is None or not health.broken_policy.certain or newest is None:
        return None
    since, limit = health.broken_policy.since, sound_iterations(trainer, health)
    if (begun := iterations_in(Path(newest))) is not None and begun <= limit:
        return f"no response has been right since iteration {since}; {newest} is from before that"
    before = last_sound(newest, trainer.ckpt_path, limit)
    left = (
        f"before it: {before}, which --ckpt_path resumes from"
        if before
        else "none from before it is left (checkpoint.save_top_k -1 keeps all)"
    )
    return f"no response has been right since iteration {since}; the newest, {newest}, is from after that; {left}"


def from_before_a_fall(trainer: L.Trainer, checkpoint: str) -> bool:
    """Whether a checkpoint may be the last sound one: the policy may be broken now but was not when it was written."""
    health = callback_of(trainer, Health)
    if health is None or not health.broken_policy.suspected:
        return False
    begun = iterations_in(Path(checkpoint))
    return begun is not None and begun <= sound_iterations(trainer, health)


def sound_iterations(trainer: L.Trainer, health: Health) -> int:
    """Number of iterations after which the policy was certainly not broken yet."""
    data = rollouts_of(trainer)
    return health.broken_policy.sound_iterations(data.async_level + data.weight_sync_interval - 1)


def last_sound(newest: str, began_from: Any, limit: int) -> str | None:
    """The newest intact checkpoint of a folder that has at most `limit` iterations; the origin counts as well.

    Args:
        newest: A checkpoint in the folder.
        began_from: Checkpoint that the run resumed from, or None.
        limit: Largest number of iterations.
    """
    found = [*Path(newest).parent.glob("*.ckpt"), *([Path(str(began_from))] if began_from else [])]
    counts = {path: iterations_in(path) for path in found if flaw(path) is None}
    sound = {path: count for path, count in counts.items() if count is not None and count <= limit}
    return str(max(sound, key=lambda path: sound[path])) if sound else None


def iterations_in(checkpoint: Path) -> int | None:
    """Number of iterations that a checkpoint has begun; None if it cannot be read."""
    try:
        return int(read_checkpoint(checkpoint)["RolloutDataModule"]["iteration"])
    except (SettingError, KeyError):
        return None
