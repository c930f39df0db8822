"""What a run's folder holds: the run it belongs to, and its checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from popo_lightning.core.errors import SettingError
from popo_lightning.metrics.table import METRICS, Behind
from popo_lightning.runs.checkpoint_files import META, newest_whole, state_in
from popo_lightning.runs.record import RECORD, read_record, record_in

CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
SUMMARY = "summary.json"


def is_first_rank() -> bool:
    """Before the strategy exists: Lightning reads the rank from the launcher's environment."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def holds_run(folder: Path) -> bool:
    """Whether a run has written its numbers, or a checkpoint, there."""
    if any((folder / name).exists() for name in (METRICS, SUMMARY, CHECKPOINTS)):
        return True
    try:
        return (folder / RECORD).exists() and newest_of(checkpoint_folders(folder)) is not None
    except SettingError:  # a damaged record is somebody's
        return True


def checkpoint_folders(folder: Path) -> list[Path]:
    """Where the checkpoints of the run in a folder may be: those that its record names, and the usual one."""
    record = read_record(folder)
    return list(dict.fromkeys([*(record.checkpoint_folders(folder) if record else []), folder / CHECKPOINTS]))


def newest_of(folders: Sequence[Path]) -> Path | None:
    """The newest checkpoint of several folders, or None."""
    found = [path for folder in folders if (path := newest_checkpoint(folder)) is not None]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def home_of(checkpoint: Path) -> Path | None:
    """Folder of the run that wrote a checkpoint, wherever both now lie; None where it is not to be found.

    Raises:
        SettingError: Not a checkpoint.
    """
    if checkpoint.parent.name == CHECKPOINTS:
        return checkpoint.parent.parent
    found = record_in(read_checkpoint(checkpoint))
    if found is None:
        return None
    record, folder = found
    there = read_record(folder) if folder.is_dir() else None
    return folder if there is not None and there.id == record.id else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder, or None; says which newer ones are passed over, and why."""
    found = newest_whole(folder)
    if is_first_rank():
        for path, why in found.passed_over:
            _say_passed_over(path, why)
    return found.checkpoint


@cache  # once a process
def _say_passed_over(checkpoint: Path, why: str) -> None:
    print(f"popo: passed over {checkpoint}, which {why}", file=sys.stderr)


def _last_written(checkpoint: Path) -> Path:
    return checkpoint / META if checkpoint.is_dir() else checkpoint  # sharded checkpoints are folders


def behind(checkpoint: Path) -> Behind:
    """What a checkpoint has behind it.

    Raises:
        SettingError: Training cannot resume from this checkpoint.
    """
    state = read_checkpoint(checkpoint)
    if "RolloutDataModule" in state and "callbacks" not in state:
        raise SettingError(
            f"ckpt_path is '{checkpoint}', which holds weights alone (checkpoint.save_weights_only), so training "
            "cannot resume from it; name another file"
        )
    try:
        callbacks, begun = state["callbacks"], int(state["RolloutDataModule"]["iteration"])
    except KeyError as error:
        raise _no_checkpoint(checkpoint) from error
    # the monitor keeps an iteration's steps until it has logged them
    under_way = bool(callbacks.get("Monitor", {}).get("steps"))
    history = callbacks.get("Evaluation", {}).get("history", [])
    return Behind(begun - under_way, begun, frozenset(int(entry["iteration"]) for entry in history))


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, without its weights being read from the disk.

    Raises:
        SettingError: No file, or not one that popo fit wrote.
    """
    file = _last_written(checkpoint)
    if not file.exists():
        raise SettingError(
            f"ckpt_path is '{checkpoint}', which does not exist; name a file of a run's checkpoints folder"
        )
    try:
        state = state_in(file)
    except Exception as error:  # damaged bytes fail in every way there is
        raise _no_checkpoint(checkpoint) from error
    if state is None:
        raise _no_checkpoint(checkpoint)
    return state


def _no_checkpoint(checkpoint: Path) -> SettingError:
    return SettingError(
        f"ckpt_path is '{checkpoint}', which is not a checkpoint that popo fit wrote; name a file of a run's "
        "checkpoints folder"
    )
