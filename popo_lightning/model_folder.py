"""Model folders: text or vision-language, loaded in one place for policy, engine and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from popo_lightning.errors import SettingError, reason

# What a vision tower is called inside transformers' models.
VISION_TOWERS = ("visual", "vision_tower", "vision_model")


def load_model(folder: str | Path, dtype: torch.dtype) -> Any:
    """A language model, with its vision tower where it has one.

    Raises:
        SettingError: No model loads from there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind: Any = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
        return kind.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise SettingError(f"model.path is '{folder}', from which no model loads: {reason(error)}") from error


def sees_images(config: Any) -> bool:
    """Whether a model configuration has a vision tower."""
    return getattr(config, "vision_config", None) is not None


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
