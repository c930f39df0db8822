"""Writes a saved policy as a folder that transformers and vLLM load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from popo_lightning.cli.export.adapted_policy import adapted_model, has_adapters, policy_model, write_adapter
from popo_lightning.cli.export.base_model import BaseModel, base_model
from popo_lightning.cli.export.evaluations import Measured, measured_in
from popo_lightning.cli.export.model_card import CARD, Told, model_card
from popo_lightning.cli.export.new_folder import check_free, check_room, written_beside
from popo_lightning.cli.export.rebuilt_model import cast
from popo_lightning.cli.export.saved_policy import SavedPolicy, saved_policy
from popo_lightning.cli.export.weights import POLICY
from popo_lightning.core.errors import SettingError
from popo_lightning.engines.base import end_token_ids
from popo_lightning.evaluation.results import by_benchmark
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
        _check_adapter(saved, dtype)
    encoder = PromptEncoder(began.folder, 0, saved.setting("data.image_pixels"))
    model = adapted_model(saved, began) if adapter else _whole_model(saved, began, encoder.tokenizer, target, dtype)
    images = sees_images(model.config)
    written = "float32, of an adapter" if adapter else str(model.dtype).rpartition(".")[2]
    told = Told(saved, began, written, images, command, last_measured(saved), adapter)
    with written_beside(target) as draft:
        # the processor also has the run's limits of an image's pixels
        (encoder.processor if images else encoder.tokenizer).save_pretrained(draft)
        if adapter:
            write_adapter(model, draft, began.address)
        else:
            model.save_pretrained(draft, max_shard_size=shard_bytes)
        (draft / CARD).write_text(model_card(told), encoding="utf-8", errors="backslashreplace")
    return saved


def _check_adapter(saved: SavedPolicy, dtype: str | None) -> None:
    if not has_adapters(saved):
        raise SettingError(
            f"--adapter is given, but the checkpoint '{saved.checkpoint}' holds all weights, not adapters; leave it out"
        )
    if dtype is not None:
        raise SettingError(f"--dtype is {dtype}, but --adapter writes float32 as it was trained; leave one of them out")


def _whole_model(saved: SavedPolicy, began: BaseModel, tokenizer: Any, target: Path, dtype: str | None) -> Any:
    """The policy with all its weights in their final type, for which the target's disk has room."""
    wanted: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    kept: torch.dtype = wanted or getattr(torch, saved.setting("model.dtype", "float32"))
    shapes = saved.state.get(SHAPES, {})  # noted in the checkpoint, so that no weight need be read
    check_room(target, sum(math.prod(s) * kept.itemsize for name, s in shapes.items() if name.startswith(POLICY)))
    model = policy_model(saved, began, wanted)
    model.generation_config = generation_config(saved, began, model.config, tokenizer)
    tensors = [*model.parameters(), *model.buffers()]  # tied weights count once
    check_room(target, sum(tensor.numel() * (wanted or tensor.dtype).itemsize for tensor in tensors))
    if wanted is not None:
        cast(model, wanted)
    return model


def last_measured(saved: SavedPolicy) -> Measured | None:
    """The newest evaluation that is no newer than a saved policy; None if there is none.

    Args:
        saved: The policy.
    """
    found = list(measured_in(saved.run)) if saved.run is not None else []
    history = saved.state.get("callbacks", {}).get("Evaluation", {}).get("history", [])
    found += [Measured(int(entry["iteration"]), by_benchmark(entry)) for entry in history]
    past = [each for each in found if each.iteration <= saved.iterations]
    return max(past, key=lambda each: each.iteration, default=None)  # the first of two with the same iteration


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
