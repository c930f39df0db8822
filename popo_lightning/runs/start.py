"""Decides where a run writes and what it resumes from, and claims the folder, before anything is built."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from popo_lightning.core.errors import SettingError
from popo_lightning.metrics.table import Behind
from popo_lightning.runs.checksums import check_bytes
from popo_lightning.runs.claim import claim
from popo_lightning.runs.folder import (
    CHECKPOINTS,
    behind,
    holds_run,
    home_of,
    is_first_rank,
    newest_of,
    read_checkpoint,
)
from popo_lightning.runs.record import RunRecord, read_record, record_in
from popo_lightning.runs.resume import Place, check_idle, check_length, hold, resume_in, same
from popo_lightning.runs.wanted_run import WantedRun


@dataclass(frozen=True)
class Start:
    """Where a training run writes and what it resumes from.

    Args:
        folder: Folder of the run.
        checkpoints: Folder of its checkpoints.
        record: Identity of the run.
        checkpoint: The checkpoint to resume from; None if the run begins from the model.
        behind: The progress recorded in that checkpoint.
        news: Sentences for the user, such as about an unexpected folder, printed once nothing can refuse the run.
    """

    folder: Path
    checkpoints: Path
    record: RunRecord
    checkpoint: Path | None
    behind: Behind | None
    news: tuple[str, ...] = ()

    @property
    def forks(self) -> bool:
        """Whether the run begins from another run's checkpoint now."""
        return self.checkpoint is not None and self.record.began_from(self.checkpoint)


def settle(wanted: WantedRun, claims: ExitStack) -> Start:
    """Decides where a run writes and what it resumes from, and claims its folders.

    A run gets a folder of its own: the one asked for, or root/task/method-seedN, with -2, -3 and so on appended if
    another run has it. run.resume continues the run in the folder. ckpt_path does so too if task, method, seed and all
    settings that decide what is trained are the checkpoint's. Otherwise a new run begins from that checkpoint.

    Args:
        wanted: Run that the command asks for.
        claims: Holds the folders during the run.

    Raises:
        SettingError: The command would replace another run or start over without saying so, or ckpt_path is damaged.
        RunFinished: The run has all its iterations and its summary.
    """
    place = _resumed(wanted, claims) if wanted.resume else _begun(wanted, claims)
    past = None if place.checkpoint is None else behind(place.checkpoint)
    check_length(wanted, place, past)
    if wanted.checkpoint is not None and place.checkpoint is not None and same(place.checkpoint, wanted.checkpoint):
        check_bytes(place.checkpoint)  # others are checked where they are found
    record = wanted.record
    news = place.news
    if place.resumes and place.there is not None:
        news = (*news, *_in_words(place.there.changes(record)))
        record = place.there.resumed_with(record)
    elif not place.resumes and place.checkpoint is not None and past is not None:
        origin = {"checkpoint": str(place.checkpoint.absolute()), "iterations": past.iterations}
        record = replace(record, origin=origin)
    checkpoints = _checkpoint_folder(wanted, place, record, claims)
    record = record.writing_to(place.folder, checkpoints)
    return Start(place.folder, checkpoints, record, place.checkpoint, past, news)


def _in_words(changes: list[tuple[str, str, str]], most: int = 6) -> tuple[str, ...]:
    if not changes:
        return ()
    listed = ", ".join(f"{name} {before} -> {after}" for name, before, after in changes[:most])
    more = f", and {len(changes) - most} more" if len(changes) > most else ""
    return (f"settings have changed since this run was last trained: {listed}{more}",)


# -- a new run, or a checkpoint by name ---------------------------------------------------------------------------


def _begun(wanted: WantedRun, claims: ExitStack) -> Place:
    if wanted.checkpoint is None and wanted.folder is not None:
        return Place(_asked_folder(wanted.folder, claims))
    if wanted.checkpoint is None:
        folder = _free_folder(wanted, claims)
        return Place(folder, news=_moved(wanted, folder))
    checkpoint = wanted.checkpoint
    wrote = record_in(read_checkpoint(checkpoint))
    home = home_of(checkpoint)
    difference = None if wrote is None else wrote[0].difference(wanted.record)
    if wanted.folder is not None and (home is None or not same(home, wanted.folder)):
        return Place(_asked_folder(wanted.folder, claims), checkpoint)
    if home is not None and difference is None:
        return resume_in(wanted, home, checkpoint, claims)
    if wanted.folder is not None:
        check_idle(wanted.folder)
        raise SettingError(
            f"run.folder is '{home}', whose run wrote ckpt_path with other settings ({difference}); add --run.folder "
            "null for a folder of its own, or --run.resume true to change the settings of that run from here on"
        )
    folder = _free_folder(wanted, claims)
    other = f", whose run has other settings ({difference})" if difference else ""
    news = (f"a new run in '{folder}' begins from '{checkpoint}'{other}", *_moved(wanted, folder))
    return Place(folder, checkpoint, news=news)


def _moved(wanted: WantedRun, folder: Path) -> tuple[str, ...]:
    if folder == wanted.base:
        return ()
    return (f"'{wanted.base}' belongs to another run, so this one writes to '{folder}'",)


def _free_folder(wanted: WantedRun, claims: ExitStack) -> Path:
    """The first of root/task/method-seedN, -2, -3 that no run has and no other process has claimed."""
    number = 1
    while True:
        folder = wanted.base if number == 1 else wanted.base.with_name(f"{wanted.base.name}-{number}")
        if not holds_run(folder) and (not is_first_rank() or _claimed_free(folder, claims)):
            break
        number += 1
    return folder


def _claimed_free(folder: Path, claims: ExitStack) -> bool:
    with ExitStack() as own:
        if not claim(folder, "run.root", own) or holds_run(folder):  # a run that has just ended
            return False
        claims.enter_context(own.pop_all())
    return True


def _asked_folder(folder: Path, claims: ExitStack) -> Path:
    if is_first_rank():  # it may have begun to write when the others look
        check_idle(folder)
        _check_free(folder)
        hold(folder, claims)
        _check_free(folder)  # a run may just have ended
    return folder


def _check_free(folder: Path) -> None:
    if holds_run(folder):
        raise SettingError(
            f"run.folder is '{folder}', which holds an earlier run; name another folder, or resume that run by "
            "--run.resume true"
        )


# -- a run that is resumed ----------------------------------------------------------------------------------------


def _resumed(wanted: WantedRun, claims: ExitStack) -> Place:
    home = None if wanted.checkpoint is None else home_of(wanted.checkpoint)
    folder = wanted.folder or home or wanted.base
    if wanted.checkpoint is not None and (home is None or not same(home, folder)):
        return _resumed_from_another(wanted, folder, wanted.checkpoint, claims)
    return resume_in(wanted, folder, wanted.checkpoint, claims)


def _resumed_from_another(wanted: WantedRun, folder: Path, checkpoint: Path, claims: ExitStack) -> Place:
    """Begins from another run's checkpoint, or resumes the run that began from it."""
    there = read_record(folder)
    if not holds_run(folder):
        hold(folder, claims)
        return Place(folder, checkpoint)
    if there is None or not there.began_from(checkpoint):
        raise SettingError(
            f"ckpt_path is '{checkpoint}', but run.folder is '{folder}', which holds a run that did not begin from it; "
            "name another folder, or leave ckpt_path out"
        )
    place = resume_in(wanted, folder, None, claims)
    return place if place.checkpoint is not None else replace(place, checkpoint=checkpoint)


# -- its checkpoints -----------------------------------------------------------------------------------------------


def _checkpoint_folder(wanted: WantedRun, place: Place, record: RunRecord, claims: ExitStack) -> Path:
    """Folder for checkpoints. It must not hold another run's, which might be taken for this run's or replaced."""
    if wanted.checkpoints is None:
        return place.folder / CHECKPOINTS
    folder = wanted.checkpoints
    if folder.absolute().is_relative_to(place.folder.absolute()) or not is_first_rank():
        return folder
    newest = newest_of([folder])
    own = place.checkpoint is not None and place.resumes and same(place.checkpoint.parent, folder)
    if newest is not None and not own:
        wrote = record_in(read_checkpoint(newest))
        if wrote is None or wrote[0].id != record.id:
            raise SettingError(
                f"checkpoint.dirpath is '{folder}', which holds another run's checkpoints ({newest.name}); name a "
                "folder of its own, or leave it out"
            )
    hold(folder, claims, "checkpoint.dirpath")
    return folder
