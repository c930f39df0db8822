"""Reads what a folder of shards lists, and compares its tensors with their checksums, on one process.

torch's own reader unpickles the folder's metadata, which may run an untrusted writer's code. This reader only builds
the objects that such metadata consists of, and refuses anything else.
"""

from __future__ import annotations

import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

CONTENTS = ".metadata"
KNOWN = {
    "torch.distributed.checkpoint.metadata": metadata,
    "torch.distributed.checkpoint.filesystem": filesystem,
}
NAMES = {
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "_StorageInfo", "_StoragePrefix"),
}


class TensorReader(FileSystemReader):
    """torch's reader of a folder of shards, but it reads the metadata without importing what they name."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads the metadata.

        Raises:
            pickle.UnpicklingError: The metadata name something that they should not.
        """
        with (Path(self.path) / CONTENTS).open("rb") as file:
            found = _Contents(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"{CONTENTS} is no list of contents")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Contents(pickle.Unpickler):
    """Unpickles plain containers and the few classes that describe tensors in files."""

    def find_class(self, module: str, name: str) -> Any:
        if module in KNOWN and name in NAMES:
            return getattr(KNOWN[module], name)
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {str(torch.strided): torch.strided}.__getitem__
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath"):
            return pathlib.PurePosixPath
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{CONTENTS} names {module}.{name}, which no list of contents has")


def check_parts(folder: Path, contents: Metadata, names: Collection[str]) -> None:
    """Reads the parts of tensors once, in their order on the disk.

    Args:
        folder: Folder of shards.
        contents: Its metadata.
        names: Names of the tensors.

    Raises:
        ValueError: A part is outside the folder, missing or changed.
        Exception: Damaged or hostile bytes may raise any exception.
    """
    parts: dict[str, int] = dict.fromkeys(names, 0)
    listed = [(index.fqn, part) for index, part in contents.storage_data.items() if index.fqn in parts]
    for name, part in sorted(listed, key=lambda each: (each[1].relative_path, each[1].offset)):
        if part.relative_path != Path(part.relative_path).name:
            raise ValueError(f"a part of {name} is in another folder: {part.relative_path}")
        with (folder / part.relative_path).open("rb") as file:
            if (broken := zipfile.ZipFile(_Part(file, part.offset, part.length)).testzip()) is not None:
                raise ValueError(f"the bytes of {name} are not those that were written ({broken})")
        parts[name] += 1
    for name in names:
        entry = contents.state_dict_metadata[name]
        if isinstance(entry, TensorStorageMetadata):
            covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
            if covered != entry.size.numel() or parts[name] != len(entry.chunks):
                raise ValueError(f"{name} is not whole")


class _Part:
    """A part of a file, as a file. A stranger's metadata may give it any length, so it is never read whole."""

    def __init__(self, file: Any, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._place = file, begin, length, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, self._length)[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._place)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._begin + self._place)
        found: bytes = self._file.read(size)
        self._place += len(found)
        return found
