"""Writes weights for servers: a folder of safetensors files, written parameter by parameter."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from popo_lightning.engines.base import NamedTensors

FILE_BYTES = 2**29


def write_weights(weights: NamedTensors, folder: Path | None, file_bytes: int = FILE_BYTES) -> None:
    """Writes all weights, with at most one file's weights in memory at a time.

    Args:
        weights: Weights by name. All are taken, even after an error: gathering a sharded one is a collective.
        folder: Folder to write to, made here. None writes nothing, on the ranks that only take part in gathering.
        file_bytes: Approximate size of a file.

    Raises:
        OSError: The weights cannot be written; raised after all of them have been taken.
    """
    held: dict[str, Tensor] = {}
    size = files = 0
    failed: OSError | None = None
    for name, weight in weights:
        if folder is None or failed is not None:
            continue
        held[name] = weight.detach().to("cpu", copy=True).contiguous()
        size += held[name].nbytes
        if size >= file_bytes:
            failed = _write(held, folder, files)
            held, size, files = {}, 0, files + 1
    if folder is not None and failed is None and held:
        failed = _write(held, folder, files)
    if failed is not None:
        raise failed


def _write(weights: dict[str, Tensor], folder: Path, number: int) -> OSError | None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / f"weights-{number:05d}.safetensors")
    except (OSError, SafetensorError) as error:
        return error if isinstance(error, OSError) else OSError(str(error))
    return None
