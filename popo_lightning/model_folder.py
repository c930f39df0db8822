"""Model folders: text or vision-language, loaded in one place for policy, engine and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from popo_lightning.attention import use_packed_attention
from popo_lightning.errors import SettingError, reason
from popo_lightning.packing import takes_packed_tokens

# Heads that change the logits after the linear layer: log-probs from hidden states would be silently wrong.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# What a vision tower is called inside transformers' models.
VISION_TOWERS = ("visual", "vision_tower", "vision_model")


def load_model(folder: str | Path, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A language model on the CPU, with its vision tower where it has one.

    Lightning enters a device context around ``configure_model``. transformers would take that context for a
    device_map, which needs accelerate, so the model loads on the CPU and the strategy moves it.

    Args:
        folder: Model folder or hub id.
        dtype: Of its weights.
        attention: Implementation by transformers' name; None for its default.

    Raises:
        SettingError: No model loads from there.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind: Any = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
        with torch.device("cpu"):
            return kind.from_pretrained(folder, dtype=dtype, trust_remote_code=False, attn_implementation=attention)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise SettingError(f"model.path is '{folder}', from which no model loads: {reason(error)}") from error


def load_trainable(folder: str | Path, dtype: torch.dtype, freeze_vision: bool, attention: str | None = None) -> Any:
    """A model to train: without dropout, with its vision tower frozen where asked.

    Args:
        folder: Model folder or hub id.
        dtype: Of its weights.
        freeze_vision: Train the language model only.
        attention: Implementation by transformers' name; None for that of packed tokens where it is exact.

    Raises:
        SettingError: No model loads from there, or one whose log-probs or images would be read wrongly.
    """
    model = load_model(folder, dtype, attention)
    if attention is None and takes_packed_tokens(model):
        use_packed_attention(model)
    changes = [name for name in LOGIT_CHANGES if getattr(model.config.get_text_config(), name, None)]
    if changes:
        raise SettingError(
            f"model.path is '{folder}', a model with {changes[0]}; log-probs are computed from hidden states and "
            "would be wrong, so choose a model with plain logits"
        )
    if sees_images(model.config):
        check_vision(model.config, folder)
    remove_dropout(model)
    if freeze_vision:
        tower = vision_tower(model)
        if tower is None:
            raise SettingError(
                f"model.freeze_vision is true but model.path '{folder}' has no vision tower; leave it out"
            )
        tower.requires_grad_(False)
    return model


def compile_layers(model: Any) -> None:
    """Compiles each of a model's layers, for passes of any shape; a C++ compiler is needed on a CPU."""
    for layer in layers(model):
        layer.compile(dynamic=True)


def layers(model: Any) -> list[nn.Module]:
    """A model's decoder layers, and a vision tower's, as transformers names them."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def remove_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0: with it the ratio would differ from 1 on unchanged weights."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # nn.Module types its attributes as tensors


def sees_images(config: Any) -> bool:
    """Whether a model configuration has a vision tower."""
    return getattr(config, "vision_config", None) is not None


def check_vision(config: Any, folder: str | Path) -> None:
    """Raises SettingError for a vision tower of another build than Qwen-VL's."""
    fields = ("spatial_merge_size", "temporal_patch_size", "patch_size")
    if not all(hasattr(config.vision_config, field) for field in fields):
        raise SettingError(
            f"model.path is '{folder}', a vision-language model of type {config.model_type}; those that work are "
            "Qwen2-VL and Qwen2.5-VL"
        )


def image_tokens(config: Any) -> list[int]:
    """Tokens that stand for image features. A response must not contain any: no features would belong to them."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_index")
    return sorted({token for name in names if isinstance(token := getattr(config, name, None), int)})


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The part of a model that encodes images, or None."""
    base = getattr(model, "base_model", model)
    for name in VISION_TOWERS:
        if isinstance(tower := getattr(base, name, None), nn.Module):
            return tower
    return None


def image_marks(config: Any, input_ids: Tensor) -> Tensor:
    """(R, L) 1 at image tokens and 0 elsewhere: transformers 5 places text and image positions by it."""
    return (input_ids == config.image_token_id).int()


def unseen_image(model: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zero, through the vision tower: ranks without an image must not leave the others, nor DDP, waiting for it."""
    blank = blank_image(model.config, device, dtype)
    # the pooler's output has been through all of the tower, the hidden states stop before its merger
    seen: Any = vision_tower(model)(blank["pixel_values"], grid_thw=blank["image_grid_thw"])  # type: ignore[misc]
    return seen.pooler_output.sum() * 0


def blank_image(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The smallest image a Qwen-VL tower takes, in its own input format."""
    vision = config.vision_config
    side = vision.spatial_merge_size
    channels = getattr(vision, "in_channels", None) or vision.in_chans
    patch = channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.zeros(side * side, patch, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, side, side]], device=device),
    }
