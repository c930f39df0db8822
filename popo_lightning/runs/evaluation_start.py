"""Decides what validate, test and predict evaluate, and where they write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from popo_lightning.core.errors import SettingError
from popo_lightning.runs.checksums import check_bytes
from popo_lightning.runs.claim import check_writable
from popo_lightning.runs.folder import (
    checkpoint_folders,
    holds_run,
    home_of,
    is_first_rank,
    newest_undamaged,
    read_checkpoint,
)
from popo_lightning.runs.record import CONFIG, read_record
from popo_lightning.runs.resume import same, say
from popo_lightning.runs.wanted_run import RunSettings


def folder_of_run(folder: str | None, configs: Iterable[str | Path]) -> str | None:
    """The folder that run.folder means: that of a run's config.yaml, if the run was copied or moved.

    Args:
        folder: Setting run.folder.
        configs: Files given by --config.
    """
    for file in map(Path, configs):
        own = file.parent
        if folder is None or file.name != CONFIG or read_record(own) is None or same(own, Path(folder)):
            continue
        if (yaml.safe_load(file.read_text()) or {}).get("run", {}).get("folder") == folder:  # nothing else has set it
            say(f"takes the run in '{own}', which was in '{folder}'")
            return str(own)
    return folder


def settle_evaluation(run: RunSettings, seed: int, checkpoint: str | None) -> tuple[Path, Path | None]:
    """The folder to write to and the checkpoint to evaluate; None evaluates the model itself.

    A run's folder, as its own config.yaml names it, selects the run's newest checkpoint; run.resume selects that of
    root/task/method-seedN.

    Args:
        run: Settings run.
        seed: Setting seed_everything.
        checkpoint: Setting ckpt_path.

    Raises:
        SettingError: A checkpoint is asked for but missing or damaged, or nothing can be written.
    """
    asked = None if run.folder is None else Path(run.folder)
    record = None if asked is None else read_record(asked)
    found = None if checkpoint is None else Path(checkpoint)
    if found is not None and record is not None and record.began_from(found):
        found = None  # from that run's own config.yaml; the run has trained on since
    if found is not None:
        read_checkpoint(found)
        check_bytes(found)
        written = asked or home_of(found) or Path(run.root) / run.task
    elif run.resume or (asked is not None and holds_run(asked)):
        written = asked or Path(run.root) / run.task / f"{run.method}-seed{seed}"
        found = _newest(written)
    else:
        written = asked or Path(run.root) / run.task
    if is_first_rank():
        check_writable(written, "run.root" if asked is None and found is None else "run.folder")
    return written, found


def _newest(folder: Path) -> Path:
    folders = checkpoint_folders(folder)
    found = newest_undamaged(folders)
    if found is None:
        looked = ", ".join(f"'{path}'" for path in folders)
        raise SettingError(
            f"run.folder is '{folder}', whose run has no checkpoint (looked for in {looked}); name one by ckpt_path, "
            "or add --run.folder null --run.resume false to evaluate the model that it began with"
        )
    say(f"evaluates '{found}', the newest checkpoint of the run in '{folder}'")
    return found
