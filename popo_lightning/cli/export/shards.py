"""Reads tensors from a checkpoint that is a folder of shards, on one process, for any number of ranks that wrote it.

torch.distributed.checkpoint assembles them from what runs/shards.py has read and checked.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from popo_lightning.runs.shards import TensorReader, check_parts


def tensors_of(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Whole tensors by name.

    Args:
        folder: Folder of shards.
        prefix: Prefix of their names in the folder; the returned names lack it.

    Raises:
        Exception: Damaged or hostile bytes may raise any exception.
    """
    reader = TensorReader(folder)
    contents = reader.read_metadata()
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in contents.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    check_parts(folder, contents, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a single process
        load_shards(wanted, storage_reader=reader, no_dist=True)
    return {name[len(prefix) :]: tensor for name, tensor in wanted.items()}
