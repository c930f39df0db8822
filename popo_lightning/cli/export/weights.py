"""Reads the policy's weights from a checkpoint that is not trusted: tensors and nothing else."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popo_lightning.cli.export.saved_policy import SavedPolicy
from popo_lightning.core.errors import SettingError, reason

POLICY, CRITIC, TARGET = "model.", "value_model.", "value_target."
BITS = 2**26  # bytes of a tensor in one step of its checksum


def weights_of(saved: SavedPolicy, prefix: str = POLICY) -> dict[str, Tensor]:
    """Weights by parameter name, bit for bit as in the checkpoint.

    Those of a file stay on the disk until they are used; those of shards are assembled in memory, once each.

    Args:
        saved: The checkpoint.
        prefix: Prefix of their names in the checkpoint: the policy's or the critic's.

    Raises:
        SettingError: There are no weights, or their bits have changed since they were written.
    """
    try:
        if saved.checkpoint.is_dir():
            from popo_lightning.cli.export.shards import tensors_of

            found: Mapping[str, object] = tensors_of(saved.checkpoint, f"state_dict.{prefix}")
        else:
            state = saved.state.get("state_dict")
            named = state if isinstance(state, Mapping) else {}
            found = {str(name)[len(prefix) :]: value for name, value in named.items() if str(name).startswith(prefix)}
            _check_sums(saved.checkpoint, found)
    except SettingError:
        raise
    except Exception as error:  # damaged bytes may raise any exception
        raise _damaged(saved.checkpoint, reason(error)) from error
    weights = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if prefix == POLICY and not weights:
        raise _damaged(saved.checkpoint, "it holds no weights of a policy")
    return weights


def _check_sums(file: Path, tensors: Mapping[str, object]) -> None:
    """Raises SettingError for a tensor whose size and checksum the file does not list."""
    with zipfile.ZipFile(file) as archive:
        written = {(entry.file_size, entry.CRC) for entry in archive.infolist()}
    summed: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() in summed:
            continue
        storage = tensor.untyped_storage()
        summed.add(storage.data_ptr())
        if (storage.nbytes(), checksum(storage)) not in written:
            raise _damaged(file, f"the bytes of {name} are not those that were written")


def checksum(storage: torch.UntypedStorage) -> int:
    """CRC-32 of a storage on the CPU, without a copy of it."""
    data: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    found = 0
    for begin in range(0, len(data), BITS):
        found = zlib.crc32(data[begin : begin + BITS], found)
    return found


def _damaged(checkpoint: Path, why: str) -> SettingError:
    return SettingError(f"the checkpoint '{checkpoint}' is damaged ({why}); name another one")
