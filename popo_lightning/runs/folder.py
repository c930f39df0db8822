"""Reads what a run's folder holds: the run that it belongs to, and its checkpoints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from popo_lightning.core.errors import SettingError
from popo_lightning.metrics.table import METRICS, Behind
from popo_lightning.runs.checkpoint_files import flaw, put_back, state_file, state_in, written_at
from popo_lightning.runs.checksums import damage
from popo_lightning.runs.record import RECORD, read_record, record_in

CHECKPOINTS = "checkpoints"
EVALUATIONS, RESULTS = "evaluations", "results.json"  # the folder of all evaluations, and the numbers of one
SUMMARY = "summary.json"
GLOBAL_RANKS = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # a launcher's variables that count over all nodes


def is_first_rank() -> bool:
    """Whether this is rank 0, before a strategy exists: Lightning reads the rank from the launcher's environment."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def note_nodes(nodes: int) -> None:
    """Tells the first process of another node that it is not rank 0, if no launcher has started the nodes.

    Until the ranks are joined, Lightning takes that process for rank 0.

    Args:
        nodes: Setting trainer.num_nodes.
    """
    if nodes > 1 and not any(name in os.environ for name in GLOBAL_RANKS):
        node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))  # as Lightning reads it
        own = int(getattr(rank_zero_only, "rank", 0))
        rank_zero_only.rank = own or node  # type: ignore[attr-defined]  # the trainer sets the exact rank


def holds_run(folder: Path) -> bool:
    """Whether a run has written its metrics or a checkpoint into the folder."""
    if any((folder / name).exists() for name in (METRICS, SUMMARY, CHECKPOINTS)):
        return True
    try:
        return (folder / RECORD).exists() and newest_of(checkpoint_folders(folder)) is not None
    except SettingError:  # a damaged record still belongs to a run
        return True


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders where the checkpoints of a folder's run may be: those that its record names, and the usual one."""
    record = read_record(folder)
    recorded = () if record is None else record.checkpoints
    return list(dict.fromkeys(folder / path for path in (*recorded, CHECKPOINTS)))  # an absolute path stays as it is


def newest_of(folders: Sequence[Path], fault: Callable[[Path], str | None] = flaw) -> Path | None:
    """The newest complete checkpoint of several folders, or None. Prints which newer ones are passed over, and why.

    Args:
        folders: Folders of checkpoints; they need not exist. Drafts of a killed writer do not count.
        fault: Says why a checkpoint does not count, or None if it does.
    """
    for folder in folders:
        put_back(folder)
    found = dict.fromkeys(path for folder in folders for path in folder.glob("*.ckpt"))
    for path in sorted(found, key=written_at, reverse=True):
        why = fault(path)
        if why is None:
            return path
        if is_first_rank():
            _say_passed_over(path, why)
    return None


def newest_undamaged(folders: Sequence[Path]) -> Path | None:
    """The newest checkpoint of several folders whose bytes are those that were written, or None.

    Each rank reads it once, from beginning to end. The same bytes give all ranks the same answer, before they are
    joined.
    """

    def fault(path: Path) -> str | None:
        why = flaw(path)
        if why is None and (changed := damage(path)) is not None:
            return f"is damaged ({changed})"
        return why

    return newest_of(folders, fault)


def home_of(checkpoint: Path) -> Path | None:
    """Folder of the run that wrote a checkpoint, even if both have moved; None if it cannot be found.

    Raises:
        SettingError: The file is not a checkpoint.
    """
    above = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None
    if above is not None and any((above / name).exists() for name in (RECORD, METRICS, SUMMARY)):
        return above  # else the file alone may have been copied
    found = record_in(read_checkpoint(checkpoint))
    if found is None:
        return above
    record, folder = found
    there = read_record(folder) if folder.is_dir() else None
    return folder if there is not None and there.id == record.id else None


@cache  # once per process
def _say_passed_over(checkpoint: Path, why: str) -> None:
    print(f"popo: passed over {checkpoint}, which {why}", file=sys.stderr)


def progress(begun: int, steps: int, left: int) -> tuple[int, int]:
    """Iterations whose minibatches are all done, and minibatches done of the next one.

    Args:
        begun: Iterations that have begun.
        steps: Minibatches of an iteration.
        left: Of those, the ones that the latest iteration has still to take.
    """
    return (begun - 1, steps - left) if left else (begun, 0)


def behind(checkpoint: Path) -> Behind:
    """Progress recorded in a checkpoint.

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
    """Contents of a checkpoint; the weights are not read from the disk.

    Raises:
        SettingError: The file does not exist, or popo fit did not write it.
    """
    file = state_file(checkpoint)
    if checkpoint.is_dir() and not file.exists():
        raise SettingError(
            f"ckpt_path is '{checkpoint}', a folder that is no checkpoint; name one, such as "
            "RUN/checkpoints/iteration-0015.ckpt, or resume a run by --run.folder RUN --run.resume true"
        )
    if not file.exists():
        raise SettingError(
            f"ckpt_path is '{checkpoint}', which does not exist; name a file of a run's checkpoints folder"
        )
    try:
        state = state_in(file)
    except Exception as error:  # damaged bytes may raise any exception
        raise _no_checkpoint(checkpoint) from error
    if state is None:
        raise _no_checkpoint(checkpoint)
    return state


def _no_checkpoint(checkpoint: Path) -> SettingError:
    return SettingError(
        f"ckpt_path is '{checkpoint}', which is not a checkpoint that popo fit wrote; name a file of a run's "
        "checkpoints folder"
    )
