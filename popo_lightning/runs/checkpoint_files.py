"""Checkpoint files: written under a temporary name and then renamed, and the test whether a file is complete."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from popo_lightning.core.errors import reason

DRAFT, REPLACED = ".draft", ".replaced"
META = "meta.pt"  # of a folder of shards: everything but weights and optimizer
FILES = "files.json"  # of a folder of shards, written last: bytes by file


@dataclass
class Newest:
    """What a folder offers to resume from.

    Args:
        checkpoint: The newest complete checkpoint, or None.
        passed_over: Newer incomplete checkpoints, newest first, each with the reason.
    """

    checkpoint: Path | None = None
    passed_over: list[tuple[Path, str]] = field(default_factory=list)


def newest_whole(folder: Path) -> Newest:
    """The checkpoint of a folder that was written last and is whole; drafts of a writer that died are none.

    Args:
        folder: That checkpoints are written to; it need not exist.
    """
    put_back(folder)
    found = Newest()
    for path in sorted(folder.glob("*.ckpt"), key=_written_at, reverse=True):
        why = flaw(path)
        if why is None:
            found.checkpoint = path
            break
        found.passed_over.append((path, why))
    return found


def flaw(checkpoint: Path) -> str | None:
    """Why a file, or a folder of shards, is not a whole checkpoint; None for one that is. Weights are not read."""
    if not checkpoint.is_dir():
        return _flaw_of_file(checkpoint)
    for name in (".metadata", META):
        if not (checkpoint / name).exists():
            return f"has no {name}, so that its writer did not come to an end"
    with suppress(FileNotFoundError):  # which only this package writes
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
    except Exception as error:  # damaged bytes fail in every way there is
        whole = zipfile.is_zipfile(file)  # whose table of contents stands at its end
        return f"cannot be read ({reason(error, 160) if whole else 'it is cut short, or no checkpoint'})"


def state_in(file: Path) -> dict[str, Any] | None:
    """What a file holds, without its weights being read; None where popo fit did not write it. Raises anything."""
    state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    return state if isinstance(state, dict) and "pytorch-lightning_version" in state else None


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return path.lstat().st_mtime_ns


# -- writing ---------------------------------------------------------------------------------------------------


class WholeFileIO(TorchCheckpointIO):
    """Writes a single-file checkpoint atomically: it is complete or it does not exist.

    It needs disk space for one file in the target folder. Lightning's own writer uses the temporary folder, and copies
    from there if that is another file system. Addresses such as s3:// are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes beside the path, makes sure that the bytes are on the disk, and moves the file there.

        Raises:
            OSError: It cannot be written; what was at the path is still there.
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
    """A hidden name in the same folder, gone if writing failed."""
    draft = target.with_name(f".{target.name}{DRAFT}")
    remove(draft)
    try:
        yield draft
    except BaseException:
        remove(draft)
        raise


def write(content: Any, file: Path) -> None:
    """torch.save of which the bytes are on the disk when it returns.

    Raises:
        OSError: They are not; torch would raise a RuntimeError about places in the file.
    """
    with file.open("wb", buffering=0) as raw:
        writer = _Writer(raw)
        try:
            torch.save(content, cast(IO[bytes], writer))
        except RuntimeError as error:
            raise (writer.error or error) from error
        os.fsync(raw.fileno())


class _Writer:
    """A file that remembers its first error, which torch discards."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """All of the bytes."""
        left = memoryview(data).cast("B")
        while left:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self.error = self.error or error
                raise
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        """Nothing is held back."""


def finish_folder(draft: Path, target: Path) -> None:
    """Moves a folder of shards, which is written, to its place: it is whole there or not there.

    Args:
        draft: Of :func:`draft_for`.
        target: What may be there is replaced.
    """
    with (draft / META).open("rb+") as meta:
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
    """Gives folders back their names where a writer died between taking one away and putting the next there."""
    for replaced in folder.glob(f".*{REPLACED}"):
        target = replaced.with_name(replaced.name[1:].removesuffix(REPLACED))
        if not target.exists():
            with suppress(OSError):  # another rank has done it, or nobody may
                replaced.rename(target)


def tidy(folder: Path) -> None:
    """Removes what a writer that died has left."""
    put_back(folder)
    for left in [*folder.glob(f".*{DRAFT}"), *folder.glob(f".*{REPLACED}")]:
        remove(left)


def take_away(checkpoint: Path) -> None:
    """Removes a checkpoint atomically: no part of it stays under its name."""
    away = checkpoint.with_name(f".{checkpoint.name}{DRAFT}")
    remove(away)
    with suppress(OSError):  # it is gone, or the folder takes no changes
        checkpoint.rename(away)
    remove(away)


def remove(path: Path) -> None:
    """A file, a folder or nothing; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes sure that the names of a folder are on the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
