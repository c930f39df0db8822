"""Makes untrained vision-language models for scripts/families.py."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

IMAGE_SYMBOLS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
# Rotary frequencies of time, height and width. The configuration tells vLLM whether they are interleaved.
BLOCKS: dict[str, Any] = {"mrope_section": [4, 6, 6]}
POSITIONS = {
    "qwen2_vl": BLOCKS,
    "qwen2_5_vl": BLOCKS,
    "qwen3_vl": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
SIZE = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    },
}


def vision_model(kind: str, folder: Path, tokenizer: Any, text: dict[str, Any]) -> Any:
    """Saves the processor and returns a model like Qwen's. For other kinds it saves the configuration and returns None.

    Args:
        kind: Model type of transformers.
        folder: Folder of the model.
        tokenizer: Tokenizer that image tokens are added to.
        text: Settings of the language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    if kind not in TOWERS:
        AutoConfig.for_model(kind).save_pretrained(folder)
        return None
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_SYMBOLS})
    start, end, image, video = tokenizer.convert_tokens_to_ids(IMAGE_SYMBOLS)
    rope = {"rope_type": "default", "rope_theta": 10000.0} | POSITIONS[kind]
    config = AutoConfig.for_model(
        kind,
        text_config=text | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=TOWERS[kind],
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )
    _processor(kind, tokenizer).save_pretrained(folder)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def _processor(kind: str, tokenizer: Any) -> Any:
    import transformers

    own = "Qwen3VL" if kind == "qwen3_vl" else "Qwen2VL"
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    return getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(size=SIZE, **patches),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, f"{own}VideoProcessor")(size=SIZE, **patches),
        chat_template=TEMPLATE,
    )


def picture(size: int) -> bytes:
    """Draws a square with two halves, as PNG."""
    from PIL import Image

    image = Image.new("RGB", (size, size), "white")
    image.paste("red", (0, 0, size // 2, size))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
