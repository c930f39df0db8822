"""What validate, test and predict evaluate, and where they write."""

from __future__ import annotations

from pathlib import Path

from popo_lightning.core.errors import SettingError
from popo_lightning.runs.claim import check_writable
from popo_lightning.runs.folder import checkpoint_folders, holds_run, home_of, is_first_rank, newest_of, read_checkpoint
from popo_lightning.runs.record import read_record
from popo_lightning.runs.resume import same, say


def settle_evaluation(
    folder: str | None, root: str, task: str, method: str, seed: int, resume: bool, checkpoint: str | None
) -> tuple[Path, Path | None]:
    """The folder to write to and the checkpoint to evaluate, None for the model itself.

    A run's folder, as its own config.yaml names it, means the run's newest checkpoint, and run.resume that of
    root/task/method-seedN.

    Args:
        folder: run.folder.
        root: run.root.
        task: run.task.
        method: run.method.
        seed: seed_everything.
        resume: run.resume.
        checkpoint: ckpt_path.

    Raises:
        SettingError: No checkpoint where one is asked for, or nothing can be written.
    """
    found = None if checkpoint is None else Path(checkpoint)
    if found is not None and folder is not None and _began_from(Path(folder), found):
        found = None  # of that run's own config.yaml, and long since trained on
    if found is not None:
        read_checkpoint(found)
        written = Path(folder) if folder is not None else home_of(found) or Path(root) / task
    elif resume or (folder is not None and holds_run(Path(folder))):
        written = Path(folder) if folder is not None else Path(root) / task / f"{method}-seed{seed}"
        found = _newest(written)
    else:
        written = Path(folder) if folder is not None else Path(root) / task
    if is_first_rank():
        check_writable(written, "run.folder" if folder is not None or found is not None else "run.root")
    return written, found


def _began_from(folder: Path, checkpoint: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.origin is not None and same(Path(record.origin["checkpoint"]), checkpoint)


def _newest(folder: Path) -> Path:
    folders = checkpoint_folders(folder)
    found = newest_of(folders)
    if found is None:
        looked = ", ".join(f"'{path}'" for path in folders)
        raise SettingError(
            f"run.folder is '{folder}', whose run has no checkpoint (looked for in {looked}); name one by ckpt_path, "
            "or add --run.folder null --run.resume false to evaluate the model that it began with"
        )
    read_checkpoint(found)
    say(f"evaluates '{found}', the newest checkpoint of the run in '{folder}'")
    return found
