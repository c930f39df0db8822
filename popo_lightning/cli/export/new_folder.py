"""Writes a folder completely or not at all: beside its place, and moved there once it is on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.runs.checkpoint_files import DRAFT, remove, sync_folder
from popo_lightning.runs.claim import locked

BESIDES = 2**24  # bytes for the files besides the weights


def check_free(target: Path) -> None:
    """Raises SettingError if the place is taken.

    Args:
        target: Place of a folder.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        kind = "a folder that is not empty" if target.is_dir() else "a file"
        raise SettingError(f"FOLDER is '{target}', which is {kind}; name one that is not there yet")


def check_room(target: Path, needed: int) -> None:
    """Raises SettingError if the disk has too little room.

    Args:
        target: Place of a folder.
        needed: Bytes of the folder's weights.
    """
    above = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    if free < needed + BESIDES:
        raise SettingError(
            f"FOLDER is '{target}', on a disk with {in_words(free)} free, but the weights take {in_words(needed)}; "
            "make room, name a folder elsewhere, or add --dtype bfloat16 where the weights are float32"
        )


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Yields a hidden folder beside the target, which becomes the target when all is written, or is removed on failure.

    A killed process leaves the hidden folder; the next writer to the same target removes its files.

    Args:
        target: Place of the folder; nothing or an empty folder.

    Raises:
        SettingError: Another process writes to the target, or the target cannot be written.
    """
    target = target.resolve() if target.exists() else target.absolute()
    draft = target.with_name(f".{target.name}{DRAFT}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir(exist_ok=True)
        lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise _not_written(target, error) from error
    try:
        if not locked(lock, target):
            raise SettingError(f"FOLDER is '{target}', which another export is writing to; name another folder")
        try:
            for left in draft.iterdir():
                remove(left)
            yield draft
            _sync(draft)
            draft.rename(target)  # replaces an empty folder, and nothing else
            sync_folder(target.parent)
        except BaseException:
            remove(draft)
            raise
    except (OSError, SafetensorError) as error:
        raise _not_written(target, error) from error
    finally:
        os.close(lock)


def _sync(folder: Path) -> None:
    """Flushes the files to the disk. All get the widest permissions among them: safetensors' files are private."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    allowed = max((file.stat().st_mode & 0o777 for file in files), default=0)
    for file in files:
        file.chmod(allowed)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)


def _not_written(target: Path, error: Exception) -> SettingError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room" if full or "No space" in str(error) else "name a folder that can be written to"
    return SettingError(f"FOLDER is '{target}', which cannot be written ({reason(error)}); {remedy}")


def in_words(size: float) -> str:
    """Formats bytes, such as "1.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
