"""Models given by a configuration alone: published shapes, and one small enough to count its parameters by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from popo_lightning.cli.plan.activations import Activations
from popo_lightning.cli.plan.architecture import Architecture
from popo_lightning.cli.plan.memory import Model
from popo_lightning.model.lora import Lora

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "vocab_size": 151936,
}
QWEN_3B: dict[str, Any] = QWEN | {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "math_1p5b": QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "math_7b": QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "countdown_3b": QWEN_3B,
    "geometry_vl3b": QWEN_3B
    | {
        "model_type": "qwen2_5_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    # Parameters by hand: a layer has 4 x 64 x 64 in attention, 3 x 64 x 96 in the feed-forward part, and 2 norms of 64.
    "tiny": {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
LAYER = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
EMBEDDING = 100 * 64
TINY = 2 * LAYER + 64 + 2 * EMBEDDING  # an embedding, a head and the last norm
IN_MATRICES = TINY - EMBEDDING - 5 * 64
CRITIC = TINY - EMBEDDING + 64 + 1  # a head of one number instead of the output head

# Made-up bytes per token, all different so that they can be told apart.
KEPT = Activations(layers=1000, largest=600, inputs=70, outside=30, state=4)
KEPT_SHARDED = Activations(layers=500, largest=300, inputs=35, outside=15, state=2)


def model_folder(name: str, folder: Path) -> Path:
    """Writes a folder that has only a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return folder


def model(name: str, folder: Path, freeze_vision: bool = False, lora: Lora | None = None) -> Model:
    """Returns a model given by a configuration, with measured activations."""
    from transformers import AutoConfig

    return Model(AutoConfig.from_pretrained(model_folder(name, folder)), name, freeze_vision, lora)


class GivenActivations(Model):
    """A model whose activations are fixed numbers that a test can count with."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__(None, "tiny")
        self.__dict__["architecture"] = shape

    def activations(self, dtype: torch.dtype, autocast: bool) -> Activations:
        """Returns smaller activations for bfloat16 without autocast, which sharded models use."""
        return KEPT_SHARDED if dtype == torch.bfloat16 else KEPT
