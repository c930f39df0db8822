"""Writes a saved policy as a folder that transformers and vLLM load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from popo_lightning.cli.export.adapted_policy import adapted_model, has_adapters, policy_model, write_adapter
from popo_lightning.cli.export.base_model import BaseModel, base_model
from popo_lightning.cli.export.evaluations import last_measured
from popo_lightning.cli.export.model_card import CARD, Told, model_card
from popo_lightning.cli.export.new_folder import check_free, check_room, written_beside
from popo_lightning.cli.export.rebuilt_model import cast, size_of
from popo_lightning.cli.export.saved_policy import SavedPolicy, saved_policy
from popo_lightning.cli.export.weights import POLICY
from popo_lightning.core.errors import SettingError
from popo_lightning.engines.base import end_token_ids
from popo_lightning.model.loading import image_tokens, sees_images
from popo_lightning.model.policy_checkpoint import SHAPES
from popo_lightning.model.prompts import PromptEncoder

SHARD_BYTES = 5 * 10**9  # largest file of weights


def export(
    source: str,
    target: Path,
    command: str,
    dtype: str | None = None,
    best: bool = False,
    base: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: bool = False,
) -> SavedPolicy:
    """Writes weights, configurations, tokenizer, processor and model card.

    The weights are in memory once: those of a checkpoint file are read from the disk as they are written, those of
    shards are assembled first. With a dtype, the weights are converted one at a time.

    Args:
        source: Folder of a run, or a checkpoint.
        target: Place of the folder; nothing or an empty folder.
        command: Command of the export, for the card.
        dtype: dtype of the written weights; None keeps every bit.
        best: Take the run's best checkpoint.
        base: Model that the run began with, if it is no longer where the run found it.
        shard_bytes: Size of the largest file of weights, in bytes.
        adapter: Write only the adapters, for peft, instead of weights that they are added to.

    Returns:
        The exported policy.

    Raises:
        SettingError: There is nothing to export, or no place to write it to.
    """
    check_free(target)
    saved = saved_policy(source, best)
    began = base_model(saved, base)
    if adapter:
        _write_adapter(saved, began, target, command, dtype)
        return saved
    check_room(target, _noted_size(saved, dtype))
    config = began.config()
    encoder = PromptEncoder(began.folder, 0, _image_pixels(saved))
    model = policy_model(saved, began, None if dtype is None else getattr(torch, dtype))
    model.generation_config = generation_config(saved, began, config, encoder.tokenizer)
    check_room(target, _written_size(model, dtype))
    if dtype is not None:
        cast(model, getattr(torch, dtype))
    told = Told(saved, began, str(model.dtype).rpartition(".")[2], sees_images(config), command, last_measured(saved))
    with written_beside(target) as draft:
        _tokenizer_or_processor(encoder, sees_images(config)).save_pretrained(draft)
        model.save_pretrained(draft, max_shard_size=shard_bytes)
        (draft / CARD).write_text(model_card(told), encoding="utf-8", errors="backslashreplace")
    return saved


def _write_adapter(saved: SavedPolicy, began: BaseModel, target: Path, command: str, dtype: str | None) -> None:
    """Writes adapters, tokenizer and model card.

    Raises:
        SettingError: The checkpoint has no adapters, or --dtype asks for a type.
    """
    if not has_adapters(saved):
        raise SettingError(
            f"--adapter is given, but the checkpoint '{saved.checkpoint}' holds all weights, not adapters; leave it out"
        )
    if dtype is not None:
        raise SettingError(f"--dtype is {dtype}, but --adapter writes float32 as it was trained; leave one of them out")
    model = adapted_model(saved, began)
    encoder = PromptEncoder(began.folder, 0, _image_pixels(saved))
    images = sees_images(model.config)
    told = Told(saved, began, "float32, of an adapter", images, command, last_measured(saved), adapter=True)
    with written_beside(target) as draft:
        _tokenizer_or_processor(encoder, images).save_pretrained(draft)
        write_adapter(model, draft, began.address)
        (draft / CARD).write_text(model_card(told), encoding="utf-8", errors="backslashreplace")


def generation_config(saved: SavedPolicy, base: BaseModel, config: Any, tokenizer: Any) -> Any:
    """How the run sampled: at its temperature, from the whole distribution, up to the same end tokens.

    The base model's own config may cut tails and penalise repetition, which training and evaluation did not.

    Args:
        saved: The policy.
        base: Model that the run began with.
        config: Configuration of the base.
        tokenizer: Tokenizer of the base.
    """
    from transformers import GenerationConfig

    own = base.generation_config(config)
    made = GenerationConfig(
        do_sample=True,
        temperature=float(saved.setting("data.temperature", 1.0)),
        top_k=0,
        top_p=1.0,
        bos_token_id=own.bos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id,
        eos_token_id=end_token_ids(base.folder, tokenizer),
    )
    if sees_images(config):
        made.suppress_tokens = image_tokens(config)  # they would have no image features
    return made


def _tokenizer_or_processor(encoder: PromptEncoder, images: bool) -> Any:
    """The tokenizer, or for images the processor, which also has the run's limits of an image's pixels."""
    return encoder.processor if images else encoder.tokenizer


def _image_pixels(saved: SavedPolicy) -> tuple[int, int] | None:
    found = saved.setting("data.image_pixels")
    return None if found is None else (int(found[0]), int(found[1]))


def _noted_size(saved: SavedPolicy, dtype: str | None) -> int:
    """Bytes of the weights, from the shapes that a checkpoint notes, before any is read; 0 if it notes none."""
    wide: torch.dtype = getattr(torch, dtype or saved.setting("model.dtype", "float32"))
    shapes = saved.state.get(SHAPES, {})
    return sum(math.prod(shape) * wide.itemsize for name, shape in shapes.items() if name.startswith(POLICY))


def _written_size(model: Any, dtype: str | None) -> int:
    if dtype is None:
        return size_of(model)
    wide: torch.dtype = getattr(torch, dtype)
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    return numbers * wide.itemsize
