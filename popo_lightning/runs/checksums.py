"""Compares the bytes of a checkpoint with the checksums that its files hold, so that no changed bit is used."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.runs.checkpoint_files import state_file, state_in
from popo_lightning.runs.shards import TensorReader, check_parts

MODULE = "state_dict."  # prefix of the weights, which are named without it


def check_bytes(checkpoint: Path) -> None:
    """Reads a checkpoint once, from beginning to end: weights, optimizer and all the rest.

    Args:
        checkpoint: Path of a complete file or folder of shards.

    Raises:
        SettingError: Its bytes have changed since they were written.
    """
    why = damage(checkpoint)
    if why is not None:
        raise damaged(checkpoint, why)


def damage(checkpoint: Path) -> str | None:
    """What :func:`check_bytes` finds, in words; None if every byte is as it was written."""
    try:
        found = _damage_of_file(state_file(checkpoint))
        if found is None and checkpoint.is_dir():
            contents = TensorReader(checkpoint).read_metadata()
            check_parts(checkpoint, contents, list(contents.state_dict_metadata))
        return found
    except Exception as error:  # damaged bytes may raise any exception
        return reason(error)


def damaged(checkpoint: Path, why: str) -> SettingError:
    """The refusal of a damaged checkpoint.

    Args:
        checkpoint: Its path.
        why: What is damaged, as :func:`damage` returns it.
    """
    return SettingError(f"the checkpoint '{checkpoint}' is damaged ({why}); name another one")


def changed(file: Path, tensors: Iterable[tuple[str, object]]) -> str | None:
    """Names the first tensor of a file whose size and checksum the file does not list; None if it lists all.

    Args:
        file: A checkpoint.
        tensors: Names and tensors, which :func:`state_in` has opened. Anything else among them is left out.
    """
    with zipfile.ZipFile(file) as archive:
        written = {(entry.file_size, entry.CRC) for entry in archive.infolist()}
    summed: set[int] = set()
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() in summed:
            continue
        storage = tensor.untyped_storage()
        summed.add(storage.data_ptr())
        if (storage.nbytes(), checksum(storage)) not in written:
            return f"the bytes of {name} are not those that were written"
    return None


def checksum(storage: torch.UntypedStorage) -> int:
    """CRC-32 of a storage on the CPU, without a copy of it."""
    data: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return zlib.crc32(data)


def _damage_of_file(file: Path) -> str | None:
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken is None:
        return None
    return changed(file, _named(state_in(file), "")) or f"the bytes of {broken} are not those that were written"


def _named(content: object, name: str) -> Iterator[tuple[str, object]]:
    """Tensors of a checkpoint, each with its place."""
    if is_dataclass(content):
        content = vars(content)
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _named(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes):
        for place, value in enumerate(content):
            yield from _named(value, f"{name}.{place}")
    else:
        yield name.removeprefix(MODULE), content
