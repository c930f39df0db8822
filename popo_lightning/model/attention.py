"""Attention over packed tokens that computes only what their mask shows, and the choice of a model's implementation.

Rows of a pass, several of them behind one copy of their prompt, become one sequence of tokens without any padding. The
layers' matrices then see each token once. Only attention knows of rows: on CUDA by a block mask of flex_attention,
which computes only blocks with something visible; on a CPU by rectangles of rows of about equal length.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import embedding, scaled_dot_product_attention

from popo_lightning.core.errors import SettingError
from popo_lightning.model.attention_rows import PackedRows, packed_rows

PACKED = "popo_packed"  # the name that transformers knows the attention of this file by
BLOCK = 128  # tokens of a block of the mask, on both sides
INSTALLED = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def check_attention(attention: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raises SettingError for an implementation that is not there, or does not train on this device in this type.

    Args:
        attention: model.attention.
        device: That the policy is trained on.
        dtype: That the policy computes in.
    """
    if attention in (None, "sdpa", "eager"):
        return
    assert attention is not None
    remedy = "leave model.attention out, or use sdpa"
    package = "kernels" if "/" in attention else INSTALLED.get(attention)
    if package is None and attention != "flex_attention":
        raise SettingError(
            f"model.attention is '{attention}'; use sdpa, eager, flex_attention, {', '.join(INSTALLED)}, a kernel of "
            "the hub such as kernels-community/flash-attn2, or null for the fastest that is exact"
        )
    if device.type != "cuda":
        raise SettingError(f"model.attention is '{attention}', which trains on CUDA only, not on a CPU; {remedy}")
    if package is not None and find_spec(package) is None:
        raise SettingError(
            f"model.attention is '{attention}', which needs the package {package}, and that is not installed; {remedy}"
        )
    if "flash" in attention and dtype == torch.float32:
        raise SettingError(
            f"model.attention is '{attention}', which computes in bfloat16 only; set trainer.precision bf16-mixed, or "
            f"{remedy}"
        )


def register_packed_attention() -> None:
    """Tells transformers, in this process, of the attention of this file."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)


def use_packed_attention(model: Any) -> None:
    """Lets a model of transformers take packed tokens; with any other mask, or none, it computes what sdpa does."""
    register_packed_attention()
    model.set_attn_implementation(PACKED)


# -- what a token sees ---------------------------------------------------------------------------------------------


class PackedMask(BlockMask):
    """A block mask that may know the rows instead, for attention on a CPU."""

    rows: PackedRows | None


def flat_mask(segments: Tensor) -> PackedMask:
    """Who sees whom among the tokens of a pass, put one after the other without padding.

    Args:
        segments: (S, L) 0 prompt, 1, 2, ... its responses, -1 padding at the right.

    Returns:
        Of (1, 1, N, N), with N the tokens that are no padding, on CUDA filled up to whole blocks.
    """
    return block_mask(segments, BLOCK) if segments.is_cuda else row_mask(segments)


def row_mask(segments: Tensor) -> PackedMask:
    """As :func:`flat_mask`, by rows. Its one block is there for transformers, which would make a mask of its own."""
    rows = packed_rows(segments)
    tokens = len(rows.places)
    block = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=segments.device)
    mask: PackedMask = PackedMask.from_kv_blocks(block[0] + 1, block, BLOCK_SIZE=tokens, seq_lengths=(tokens, tokens))
    mask.rows = rows
    return mask


def block_mask(segments: Tensor, multiple: int = 1) -> PackedMask:
    """As :func:`flat_mask`, by blocks.

    Args:
        segments: (S, L)
        multiple: Tokens are filled up to this, by tokens that see only one another.
    """
    kept = segments >= 0
    text = torch.arange(len(segments), device=segments.device)[:, None].expand_as(segments)[kept]
    own, prompt = _numbered(segments[kept], text)
    filled = -len(own) % multiple
    if filled:
        own, prompt = (torch.cat((each, own[-1:].expand(filled) + 1)) for each in (own, prompt))
    mask = _block_mask(own.int(), prompt.int())
    mask.rows = None
    return mask


def _numbered(segments: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """((N,), (N,)): for each token the number of its segment, counted through all texts, and of its text's prompt."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[1:] = (segments[1:] != segments[:-1]) | (text[1:] != text[:-1])
    own = begins.cumsum(0) - 1
    first = torch.ones_like(begins)
    first[1:] = text[1:] != text[:-1]
    return own, own[first][first.cumsum(0) - 1]


def _block_mask(own: Tensor, prompt: Tensor) -> PackedMask:
    """The mask from the numbers of segments, which never fall: blocks are judged by their first and last tokens."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (own[query] == own[key]) | (prompt[query] == own[key])
        return (query >= key) & same

    tokens = len(own)
    first = torch.arange(0, tokens, BLOCK, device=own.device)
    last = (first + BLOCK - 1).clamp(max=tokens - 1)
    low, high, of, of_last = own[first], own[last], prompt[first], prompt[last]
    earlier = torch.ones(len(first), len(first), dtype=torch.bool, device=own.device).tril_(-1)
    row, column = slice(None), None
    # of a block of queries only the first text and its first segment can have begun in an earlier block
    reached = (high[None] >= low[row, column]) | ((low[None] <= of[row, column]) & (of[row, column] <= high[None]))
    one_segment = (low == high)[row, column]
    whole = (of == of_last)[row, column] & (
        ((low[None] == of[row, column]) & (high[None] == of[row, column]))
        | (one_segment & (high[None] == low[row, column]) & ((low == high)[None]))
        | (one_segment & (high[None] == low[row, column]) & (low[None] == of[row, column]) & (high == low + 1)[None])
    )
    full = earlier & whole
    partial = (earlier & reached & ~full) | torch.eye(len(first), dtype=torch.bool, device=own.device)
    mask: PackedMask = PackedMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens)
    )
    return mask


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, K) true where a block belongs to a list, as ((1, 1, Q) how many, (1, 1, Q, K) which, those first)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], order.int()[None, None]


# -- the attention -------------------------------------------------------------------------------------------------


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: Whose attention.
        query: (B, heads, N, D)
        key: (B, key heads, N, D), of which several query heads may share one.
        value: (B, key heads, N, V), where V may differ from D.
        attention_mask: A `flat_mask`, or what sdpa takes.
        scaling: Of the scores; None for 1 / sqrt(D).
        dropout: Only for sdpa.
        others: What sdpa takes.

    Returns:
        (B, N, heads, V) and no attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    dtype = _computed_in(value)
    query, key, value = (each.to(dtype) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, PackedMask) and attention_mask.rows is not None:
        return over_rows(query, key, value, attention_mask.rows, scale), None
    grouped = query.shape[1] != key.shape[1]
    found: Any = _flex(query.device.type)(query, key, value, block_mask=attention_mask, scale=scale, enable_gqa=grouped)
    return found.transpose(1, 2).contiguous(), None


def _computed_in(value: Tensor) -> torch.dtype:
    """What autocast makes of scaled_dot_product_attention's arguments: flex_attention's it leaves as they are."""
    if torch.is_autocast_enabled(value.device.type):
        return torch.get_autocast_dtype(value.device.type)
    return value.dtype


def _flex(device: str) -> Any:
    # inside a layer that is compiled it is part of that; on a CPU the plain one needs no C++ compiler
    return flex_attention if device == "cpu" or torch.compiler.is_compiling() else _compiled_flex()


@cache
def _compiled_flex() -> Any:
    # dynamic: passes are of any number of tokens, and each static one would be compiled anew for half a minute. Their
    # number is a multiple of BLOCK, so that no pass is short enough for the kernel that decodes.
    return torch.compile(flex_attention, dynamic=True)


def over_rows(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float) -> Tensor:
    """Attention of each row by itself, in rectangles of rows of about equal length.

    Args:
        query: (1, heads, N, D)
        key: (1, key heads, N, D)
        value: (1, key heads, N, V)
        rows: That the N tokens make.
        scale: Of the scores.

    Returns:
        (1, N, heads, V), under autocast too of the given type
    """
    heads, tokens = query.shape[1:3]
    # A CPU's kernel is faster in float32 than in bfloat16, and rounds nothing.
    exact = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
    # (N, heads x width): embedding takes rows of a matrix, and its backward pass adds up what came of one row fastest.
    flat = [each[0].transpose(0, 1).reshape(tokens, -1).to(exact) for each in (query, key, value)]
    grouped, found = heads != key.shape[1], []
    for each in rows.rectangles:
        q, k, v = (
            embedding(places, of).unflatten(-1, (whole.shape[1], -1)).transpose(1, 2)
            for places, of, whole in zip((each.queries, each.keys, each.keys), flat, (query, key, value), strict=True)
        )
        with torch.autocast(query.device.type, enabled=False):  # which would round them again
            seen = scaled_dot_product_attention(q, k, v, attn_mask=each.mask.to(exact), scale=scale, enable_gqa=grouped)
        found.append(seen.transpose(1, 2).flatten(2).flatten(0, 1))
    return embedding(rows.places, torch.cat(found)).view(1, tokens, heads, -1).to(query.dtype)
