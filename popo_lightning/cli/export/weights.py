"""Reads the policy's weights from a checkpoint that is not trusted: tensors and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from popo_lightning.cli.export.saved_policy import SavedPolicy
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.runs.checksums import changed, damaged
from popo_lightning.runs.shards import TensorReader, check_parts

POLICY = "model."


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
            found: Mapping[str, object] = tensors_of(saved.checkpoint, f"state_dict.{prefix}")
        else:
            state = saved.state.get("state_dict")
            named = state if isinstance(state, Mapping) else {}
            found = {str(name)[len(prefix) :]: value for name, value in named.items() if str(name).startswith(prefix)}
            why = changed(saved.checkpoint, found.items())
            if why is not None:
                raise damaged(saved.checkpoint, why)
    except SettingError:
        raise
    except Exception as error:  # damaged bytes may raise any exception
        raise damaged(saved.checkpoint, reason(error)) from error
    weights = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if prefix == POLICY and not weights:
        raise damaged(saved.checkpoint, "it holds no weights of a policy")
    return weights


def tensors_of(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Whole tensors of a folder of shards by name, read by one process for any number of ranks that wrote it.

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
