"""Attention of a decoding step, in which every row has one new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from popo_lightning.model.attention import register_attention
from popo_lightning.model.packing import attends_to_all

STEP = "popo_step"  # name of this file's attention in transformers


def takes_whole_masks(model: Any) -> bool:
    """Returns whether a step may give a model's layers their mask as (R, 1, 1, columns), which is left alone.

    Of a mask of rows and columns transformers asks whether it hides anything, and so waits for the device at each step
    (fast_all in masking_utils.py). Layers with a window need their own masks, and positions that are not rotary may be
    counted from a mask of rows and columns.

    Args:
        model: A transformers model.
    """
    config = model.config.get_text_config()
    return (
        config._attn_implementation in ("sdpa", STEP)
        and attends_to_all(config)
        and bool(getattr(config, "rope_parameters", None))
    )


def step_mask(columns: int, padding: Tensor, whole: bool) -> Tensor:
    """Makes the mask of a step, true where a row's token attends.

    Args:
        columns: Number of columns of the cache, with the new one.
        padding: (R,) number of columns before each row begins.
        whole: Whether the model takes whole masks.

    Returns:
        (R, 1, 1, columns) if it does, otherwise (R, columns).
    """
    mask = torch.arange(columns, device=padding.device) >= padding[:, None]
    return mask[:, None, None] if whole else mask


def use_step_attention(model: Any) -> None:
    """Lets the query heads of a step share their keys, if the model calls transformers' registered attention.

    With a mask, transformers' sdpa copies the whole cache for each query head, in each layer and step.

    Args:
        model: A transformers model.
    """
    config = model.config
    if config._attn_implementation != "sdpa" or not type(model)._supports_attention_backend:
        return
    register_attention(STEP, step_attention)
    model.set_attn_implementation(STEP)


def step_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes attention, with the arguments of transformers' attention functions.

    All tokens of a step are at the end of their rows, so the query heads of a key head take the place of query
    positions. Anything but a step with a mask is computed as with sdpa.

    Args:
        module: The layer's attention module.
        query: (R, heads, N, D) queries; N is 1 in a step.
        key: (R, key heads, columns, D) keys.
        value: (R, key heads, columns, V) values.
        attention_mask: (R, 1, N, columns) mask, or None.
        scaling: Factor of the scores; None for 1 / sqrt(D).
        others: Further arguments of sdpa.

    Returns:
        (R, N, heads, V) outputs, and None for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    (rows, heads, count, width), groups = query.shape, key.shape[1]
    shares = count == 1 and heads > groups and attention_mask is not None and attention_mask.shape[1] == 1
    if not shares or others.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    shared = query.reshape(rows, groups, heads // groups, width)
    seen = scaled_dot_product_attention(shared, key, value, attn_mask=attention_mask, scale=scaling)
    return seen.reshape(rows, 1, heads, -1), None
