"""Resumes a run in its folder: finds the checkpoint, and checks whether anything is left to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.metrics.table import Behind, iterations_logged
from popo_lightning.runs.claim import claim, holder, is_claimed
from popo_lightning.runs.folder import (
    SUMMARY,
    checkpoint_folders,
    holds_run,
    is_first_rank,
    newest_undamaged,
    read_checkpoint,
)
from popo_lightning.runs.record import RunRecord, read_record, record_in
from popo_lightning.runs.wanted_run import WantedRun

log = logging.getLogger(__name__)


class RunFinished(Exception):  # noqa: N818  # nothing went wrong
    """Nothing is left to do; the message is a sentence."""


@dataclass(frozen=True)
class Place:
    """A folder, and what a run takes from it.

    Args:
        folder: The claimed folder.
        checkpoint: The checkpoint to resume from.
        there: The run that the folder holds.
        resumes: Whether that same run is resumed.
        news: Sentences for the user, printed once nothing can refuse the run.
    """

    folder: Path
    checkpoint: Path | None = None
    there: RunRecord | None = None
    resumes: bool = False
    news: tuple[str, ...] = ()


def resume_in(wanted: WantedRun, folder: Path, checkpoint: Path | None, claims: ExitStack) -> Place:
    """Resumes the run in a folder from one of its own checkpoints.

    Args:
        wanted: Run that the command asks for.
        folder: Folder of the run.
        checkpoint: Checkpoint to resume from; None takes the newest that is not damaged.
        claims: Holds the folder during the run.

    Raises:
        SettingError: The folder holds another run, or the run's checkpoints are gone.
        RunFinished: The run is finished and has no checkpoint.
    """
    hold(folder, claims)
    there = read_record(folder)
    if checkpoint is None:
        also = [] if wanted.checkpoints is None else [wanted.checkpoints]
        checkpoint = newest_undamaged([*checkpoint_folders(folder), *also])
    wrote = None if checkpoint is None else record_in(read_checkpoint(checkpoint))
    if there is not None and wrote is not None and wrote[0].id != there.id:
        raise SettingError(
            f"'{checkpoint}' was written by another run than the one in '{folder}', which keeps its checkpoints in the "
            "same place; name the checkpoint to resume from by ckpt_path"
        )
    there = there or (None if wrote is None else wrote[0])
    difference = None if there is None else there.another_run(wanted.record)
    if difference is not None:
        raise SettingError(
            f"'{folder}' holds another run ({difference}); resume it with its own settings, or begin a new one from "
            f"its weights and state by --ckpt_path {quote(str(checkpoint or 'CHECKPOINT'))}, without run.resume and "
            "run.folder"
        )
    if checkpoint is None:
        _check_anew(wanted, folder, there)
    return Place(folder, checkpoint, there, resumes=True)


def _check_anew(wanted: WantedRun, folder: Path, there: RunRecord | None) -> None:
    """Raises if a run's checkpoints are gone; a run that was stopped before its first one may begin anew."""
    done = iterations_logged(folder)
    finished = _finished_iterations(folder)
    if finished is not None and finished >= wanted.limit:
        raise RunFinished(_finished(wanted, folder, finished))
    if finished is not None or (there or wanted.record).must_have_checkpoint(done):
        looked = ", ".join(f"'{path}'" for path in checkpoint_folders(folder))
        raise SettingError(
            f"run.resume is true, but the run in '{folder}', which has made {done} iterations, has no checkpoint "
            f"(looked for in {looked}); name one by ckpt_path, or another run.folder to begin anew"
        )
    if done:
        say(
            f"the run in '{folder}' was stopped in iteration {done + 1}, before its first checkpoint, and begins anew; "
            "its numbers so far are kept in metrics.csv.before-resume"
        )


def check_length(wanted: WantedRun, place: Place, past: Behind | None) -> None:
    """Compares the iterations done with trainer.max_epochs.

    Args:
        wanted: Run that the command asks for.
        place: Folder that the run will write to, and its checkpoint.
        past: Progress of the checkpoint that the run resumes from.

    Raises:
        SettingError: The checkpoint has more iterations, or a new run would have none.
        RunFinished: Nothing is left to do.
    """
    if past is None:
        return
    if past.begun < wanted.limit:
        _check_early_stop(wanted, place, past)
        return
    if past.begun > wanted.limit:
        raise SettingError(
            f"trainer.max_epochs is {wanted.max_epochs}, but '{place.checkpoint}' comes after {past.begun} iterations; "
            "raise it, or name an earlier checkpoint by ckpt_path"
        )
    if past.iterations < past.begun:  # its last iteration lacks steps or its row of metrics
        return
    if not place.resumes:
        raise SettingError(
            f"trainer.max_epochs is {wanted.max_epochs}, and '{place.checkpoint}' comes after as many iterations, so "
            "that nothing is left to train; raise it"
        )
    finished = _finished_iterations(place.folder)
    if finished is not None and finished == past.iterations:
        raise RunFinished(_finished(wanted, place.folder, finished))
    say(
        f"the run in '{place.folder}' has made all its {past.iterations} iterations; what is left is the last "
        f"evaluation and {SUMMARY}"
    )


def _check_early_stop(wanted: WantedRun, place: Place, past: Behind) -> None:
    """Raises RunFinished if EarlyStopping has ended the run under the settings that the run still has."""
    if not place.resumes or place.checkpoint is None:
        return
    ended = read_checkpoint(place.checkpoint).get("callbacks", {}).get("EarlyStops", {}).get("ended")
    if ended is None or ended["settings"] != wanted.stopping:
        return
    if _finished_iterations(place.folder) == past.iterations:
        raise RunFinished(early_stop_in_words(place.folder, ended))


def early_stop_in_words(folder: Path | str, ended: Mapping[str, Any]) -> str:
    """Says that a run was stopped early, why, and how to train it further.

    Args:
        folder: Folder of the run.
        ended: State that callbacks.early_stops saved.
    """
    return (
        f"the run in '{folder}' was stopped early, after iteration {ended['iteration']} ({ended['why']}); change the "
        "settings of EarlyStopping in trainer.callbacks, or leave it out, to train it further"
    )


def _finished_iterations(folder: Path) -> int | None:
    """Iterations in the run's summary; None if there is no summary."""
    try:
        return int(json.loads((folder / SUMMARY).read_text())["iterations"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished(wanted: WantedRun, folder: Path, iterations: int) -> str:
    later = folder.with_name(f"{folder.name}-2")
    also = (
        f"; '{later}' holds a later run, which --run.folder {quote(str(later))} --run.resume true continues"
        if not wanted.folder and holds_run(later)
        else ""
    )
    return (
        f"the run in '{folder}' is finished ({iterations} iterations, trainer.max_epochs {wanted.max_epochs}); raise "
        f"trainer.max_epochs to train it further{also}"
    )


def hold(folder: Path, claims: ExitStack, setting: str = "run.folder") -> None:
    """Claims a folder until the run ends; rank 0 does so for all ranks.

    Args:
        folder: Folder that will be written to.
        claims: Holds the folder.
        setting: Setting that names the folder.

    Raises:
        SettingError: Another process writes to the folder, or it cannot be written to.
    """
    if is_first_rank() and not claim(folder, setting, claims):
        raise _taken(folder, setting)


def check_idle(folder: Path) -> None:
    """Raises SettingError if a process is writing to a run's folder; looks on rank 0 only, and claims nothing."""
    if is_first_rank() and is_claimed(folder):
        raise _taken(folder, "run.folder")


def _taken(folder: Path, setting: str) -> SettingError:
    return SettingError(
        f"{setting} is '{folder}', which {holder(folder)} is writing to; wait until it ends, or stop it, or name "
        "another folder"
    )


def same(left: Path | str, right: Path | str) -> bool:
    """Whether two paths are the same place."""
    return Path(left).resolve() == Path(right).resolve()


def say(sentence: str) -> None:
    """Logs a sentence once, on rank 0."""
    if is_first_rank():
        log.warning("%s", sentence)
