"""Checks a model folder's files before anything loads, and names what is missing or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from popo_lightning.core.errors import SettingError, reason

CONFIG, ADAPTER, METRICS = "config.json", "adapter_config.json", "metrics.csv"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
OBJECTS = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json", *INDICES),
)
POINTER = b"version https://git-lfs"


def check_model_files(folder: str | Path) -> None:
    """Raises SettingError for a folder that no model loads from. A hub id is not checked.

    Args:
        folder: Value of model.path.
    """
    path = Path(folder)
    check_adapter(folder)
    if path.exists() and (sentence := _objection(path)) is not None:
        raise SettingError(f"model.path is '{folder}', {sentence}")


def check_adapter(folder: str | Path) -> None:
    """Raises SettingError for the folder of a LoRA adapter, which is not a whole model."""
    if (Path(folder) / ADAPTER).is_file():
        raise SettingError(
            f"model.path is '{folder}', an adapter (it has an {ADAPTER}) without its model; merge it into its base "
            "model (peft: merge_and_unload, then save_pretrained, with the tokenizer), give that folder, and set "
            "model.lora to train a new adapter"
        )


def _objection(path: Path) -> str | None:
    if path.suffix == ".ckpt":
        return "a checkpoint of a run; set model.path to the model that the run began with, and ckpt_path to this"
    if path.is_file():
        return "a file; name the folder that it lies in"
    if not (path / CONFIG).exists():
        if (path / METRICS).exists():
            return (
                "the folder of a run, which has checkpoints and no model; set model.path to the model that the run "
                "began with, and ckpt_path to a checkpoint"
            )
        return f"a folder without {CONFIG}; name one that save_pretrained of transformers has written, or a hub id"
    objects = {}
    for name in OBJECTS:
        if (path / name).exists():
            try:
                objects[name] = _object(path / name)
            except (OSError, ValueError) as error:
                return _damaged(name, error)
    return _of_weights(path, objects)


def _object(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _of_weights(path: Path, objects: dict[str, dict[str, Any]]) -> str | None:
    from safetensors import SafetensorError, safe_open

    whole = path / "model.safetensors"
    files = {whole.name} if whole.exists() else set()
    for index in () if files else INDICES:
        parts = objects.get(index, {}).get("weight_map")
        if index in objects and not (isinstance(parts, dict) and parts):
            return f"whose {index} names no weights; copy it there again"
        files |= set(map(str, (parts or {}).values()))
    missing = sorted(name for name in files if not (path / name).exists())
    if missing:
        return f"in which {missing[0]} is missing ({len(missing)} of {len(files)} weight files); copy it there too"
    for name in sorted(files):
        try:
            with (path / name).open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    return f"whose {name} is a pointer of Git LFS, not the weights; run git lfs pull there"
            if name.endswith(".safetensors"):
                with safe_open(path / name, framework="pt"):
                    pass
        except (OSError, SafetensorError) as error:
            return _damaged(name, error)
    return None


def _damaged(name: str, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"whose {name} cannot be read ({reason(error)}); allow it, by chmod u+r if it is yours"
    return f"whose {name} is damaged ({reason(error)}); copy it there again"
