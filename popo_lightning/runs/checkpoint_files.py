"""Writes checkpoint files under a temporary name and then renames them; checks whether a file is complete."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from popo_lightning.core.errors import reason

DRAFT, REPLACED = ".draft", ".replaced"
META = "meta.pt"  # in a folder of shards: everything but weights and optimizer
FILES = "files.json"  # in a folder of shards, written last: size of each file in bytes
NOTE = b"written at ns "  # in the comment of a file, which is a zip archive
END = b"PK\5\6" + bytes(18)  # of an archive without a comment, but for its numbers


def flaw(checkpoint: Path) -> str | None:
    """Why a file or a folder of shards is no complete checkpoint; None if it is one. Does not read weights."""
    if not checkpoint.is_dir():
        return _flaw_of_file(checkpoint)
    for name in (".metadata", META):
        if not (checkpoint / name).exists():
            return f"has no {name}, so that its writer did not come to an end"
    with suppress(FileNotFoundError):  # only this package writes that file
        for name, size in json.loads((checkpoint / FILES).read_text()).items():
            file = checkpoint / name
            if not file.exists() or file.stat().st_size != size:
                return f"lacks bytes of {name}"
    return _flaw_of_file(checkpoint / META)


def _flaw_of_file(file: Path) -> str | None:
    if not file.exists():
        return "is a link to nothing"
    try:
        return None if state_in(file) is not None else "is not one that popo fit wrote"
    except Exception as error:  # damaged bytes may raise any exception
        whole = zipfile.is_zipfile(file)  # its table of contents is at the end
        return f"cannot be read ({reason(error, 160) if whole else 'it is cut short, or no checkpoint'})"


def state_file(checkpoint: Path) -> Path:
    """The file with everything but weights and optimizer; in a folder of shards it is a file of its own."""
    return checkpoint / META if checkpoint.is_dir() else checkpoint


def state_in(file: Path) -> dict[str, Any] | None:
    """Contents of a file, without reading weights; None if popo fit did not write it. May raise any exception."""
    state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    return state if isinstance(state, dict) and "pytorch-lightning_version" in state else None


def written_at(checkpoint: Path) -> tuple[int, str]:
    """By which checkpoints are in the order of writing, copied or not; few bytes are read.

    The time in ns that is noted in the file, of other writers the file's own; of equal times the name decides.
    """
    with suppress(OSError), state_file(checkpoint).open("rb") as opened:
        opened.seek(-len(_noted(0)), os.SEEK_END)
        noted = opened.read()
        if noted.startswith(NOTE) and noted[len(NOTE) :].isdigit():
            return int(noted[len(NOTE) :]), checkpoint.name
    try:
        return checkpoint.stat().st_mtime_ns, checkpoint.name
    except OSError:
        return checkpoint.lstat().st_mtime_ns, checkpoint.name


# -- writing ---------------------------------------------------------------------------------------------------


class WholeFileIO(TorchCheckpointIO):
    """Writes a single-file checkpoint atomically: it is complete or it does not exist.

    It needs disk space for one file in the target folder. Lightning's own writer uses the temporary folder, and copies
    from there if that is another file system. Addresses such as s3:// are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes beside the path, flushes the bytes to the disk, and moves the file into place.

        Raises:
            OSError: The file cannot be written; an earlier one at the path is still there.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft_for(target) as draft:
            write(checkpoint, draft)
            draft.replace(target)
            sync_folder(target.parent)


@contextmanager
def draft_for(target: Path) -> Iterator[Path]:
    """Yields a hidden name in the same folder, which is removed if writing fails."""
    draft = target.with_name(f".{target.name}{DRAFT}")
    remove(draft)
    try:
        yield draft
    except BaseException:
        remove(draft)
        raise


def write(content: Any, file: Path) -> None:
    """Saves like torch.save, but returns only when the bytes are on the disk.

    Raises:
        OSError: The bytes cannot be written; torch would raise a RuntimeError about positions in the file.
    """
    with file.open("wb+", buffering=0) as raw:
        writer = _Writer(raw)
        try:
            torch.save(content, cast(IO[bytes], writer))
        except RuntimeError as error:
            raise (writer.error or error) from error
        note_time(raw)
        os.fsync(raw.fileno())


def note_time(file: IO[bytes]) -> None:
    """Notes the time in the comment of what torch.save has written, for :func:`written_at`.

    Args:
        file: Opened for reading and writing; in one that has a note, the note stays.
    """
    file.seek(-len(END), os.SEEK_END)
    end = file.read(len(END))
    if end.startswith(END[:4]) and end.endswith(END[-2:]):
        note = _noted(time.time_ns())
        file.seek(-2, os.SEEK_END)
        _Writer(file).write(struct.pack("<H", len(note)) + note)


def _noted(nanoseconds: int) -> bytes:
    return NOTE + b"%020d" % nanoseconds


class _Writer:
    """A file that remembers its first error, which torch discards."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all bytes."""
        left = memoryview(data).cast("B")
        while left:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self.error = self.error or error
                raise
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        """Does nothing, since nothing is buffered."""


def finish_folder(draft: Path, target: Path) -> None:
    """Moves a written folder of shards into place, where it is complete or absent.

    Args:
        draft: Folder from :func:`draft_for`.
        target: Final path; what is there is replaced.
    """
    with (draft / META).open("rb+", buffering=0) as meta:
        note_time(meta)
        os.fsync(meta.fileno())
    sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
    with (draft / FILES).open("w") as file:
        json.dump(sizes, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(draft)
    if target.exists():
        replaced = target.with_name(f".{target.name}{REPLACED}")
        remove(replaced)
        target.rename(replaced)
    draft.rename(target)
    sync_folder(target.parent)
    remove(target.with_name(f".{target.name}{REPLACED}"))


def put_back(folder: Path) -> None:
    """Restores the names of folders whose writer died between moving one away and putting the next in its place."""
    for replaced in folder.glob(f".*{REPLACED}"):
        target = replaced.with_name(replaced.name[1:].removesuffix(REPLACED))
        if not target.exists():
            with suppress(OSError):  # another rank has done it, or the folder is read-only
                replaced.rename(target)


def tidy(folder: Path) -> None:
    """Removes what a killed writer left behind."""
    put_back(folder)
    for left in [*folder.glob(f".*{DRAFT}"), *folder.glob(f".*{REPLACED}")]:
        remove(left)


def take_away(checkpoint: Path) -> None:
    """Removes a checkpoint atomically: no part of it stays under its name."""
    away = checkpoint.with_name(f".{checkpoint.name}{DRAFT}")
    remove(away)
    with suppress(OSError):  # it is gone, or the folder is read-only
        checkpoint.rename(away)
    remove(away)


def remove(path: Path) -> None:
    """Removes a file or a folder if it exists; ignores errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk if its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
