"""Where a run writes, and how a resumed run goes on writing there."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from popo_lightning.checkpoint_files import newest_whole
from popo_lightning.errors import SettingError

CHECKPOINTS = "checkpoints"
METRICS = "metrics.csv"


def choose_folder(folder: str | None, root: str, task: str, method: str, seed: int, checkpoint: str | None) -> Path:
    """The run's folder.

    Args:
        folder: Asked for by name, or None.
        root: Folder of all runs.
        task: Name of the task.
        method: Name of the method.
        seed: The run's seed.
        checkpoint: Checkpoint to resume from, or None.

    Returns:
        The folder asked for; else the one the checkpoint lies in; else root/task/method-seedN, with -2, -3 and so on
        behind it where an earlier run has it.

    Raises:
        SettingError: The folder asked for holds another run.
    """
    if folder is not None:
        # rank 0 may have begun to write by the time the others look
        if _is_first_rank() and checkpoint is None and _holds_run(Path(folder)):
            raise SettingError(
                f"run.folder is '{folder}', which holds an earlier run; name another folder, or go on with that run by "
                "--run.resume true"
            )
        return Path(folder)
    if checkpoint is not None and Path(checkpoint).parent.name == CHECKPOINTS:
        return Path(checkpoint).parent.parent
    base = Path(root) / task / f"{method}-seed{seed}"
    candidate, number = base, 1
    while _holds_run(candidate):
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


def evaluation_folder(folder: str | None, root: str, task: str, checkpoint: str | None) -> Path:
    """Where validate, test and predict write: the folder asked for, the checkpoint's run, or root/task."""
    if folder is not None:
        return Path(folder)
    if checkpoint is not None and Path(checkpoint).parent.name == CHECKPOINTS:
        return Path(checkpoint).parent.parent
    return Path(root) / task


def _is_first_rank() -> bool:
    """Before the strategy exists: Lightning reads the rank from the launcher's environment."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _holds_run(folder: Path) -> bool:
    return (folder / METRICS).exists() or (folder / CHECKPOINTS).exists()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, or None; says which newer ones are passed over, and why."""
    found = newest_whole(folder / CHECKPOINTS)
    if _is_first_rank():
        for path, why in found.passed_over:
            print(f"popo: passed over {path}, which {why}", file=sys.stderr)
    return found.checkpoint


def _last_written(checkpoint: Path) -> Path:
    return checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint  # sharded checkpoints are folders


def iterations_done(checkpoint: Path) -> int:
    """How many iterations a checkpoint has behind it, with their row in metrics.csv.

    Raises:
        SettingError: Not a checkpoint that training can go on from.
    """
    state = read_checkpoint(checkpoint)
    try:
        # the monitor keeps an iteration's steps until it has logged them
        under_way = bool(state["callbacks"].get("Monitor", {}).get("steps"))
        return int(state["RolloutDataModule"]["iteration"]) - under_way
    except KeyError as error:
        raise _no_checkpoint(checkpoint) from error


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
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # damaged bytes fail in every way there is
        raise _no_checkpoint(checkpoint) from error
    if not isinstance(state, dict) or "pytorch-lightning_version" not in state:
        raise _no_checkpoint(checkpoint)
    return state


def _no_checkpoint(checkpoint: Path) -> SettingError:
    return SettingError(
        f"ckpt_path is '{checkpoint}', which is not a checkpoint that popo fit wrote; name a file of a run's "
        "checkpoints folder"
    )


def loggers(folder: Path, resumed_at: int | None) -> list[Logger]:
    """metrics.csv and TensorBoard events, in the folder itself.

    Args:
        folder: The run's folder.
        resumed_at: Iterations done by the checkpoint that is resumed: earlier rows stay, later ones, which will be
            written again, go (to metrics.csv.before-resume). None for a new run.
    """
    path = folder / METRICS
    kept: list[dict[str, str]] = []
    if resumed_at is not None and path.exists() and _is_first_rank():
        shutil.copyfile(path, path.with_suffix(".csv.before-resume"))
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) <= resumed_at]
        path.unlink()  # the logger would delete it anyway, with a warning
    table = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    for row in kept:
        values: dict[str, Tensor | float] = {k: float(v) for k, v in row.items() if v and k != "step"}
        table.log_metrics(values, step=int(row["step"]))
    purge_step = None if resumed_at is None else resumed_at + 1
    board = TensorBoardLogger(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
    return [table, board]
