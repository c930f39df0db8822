"""Attention over packed tokens that computes only what their mask shows, and the choice of a model's implementation.

The rows of a pass, several of them behind one copy of their prompt, become one sequence of tokens without padding. The
layers' matrices then process each token once. Only attention distinguishes rows: on CUDA by a block mask of
flex_attention, which computes only blocks with something visible; on a CPU by rectangles of rows of similar length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import embedding, scaled_dot_product_attention

from popo_lightning.core.errors import SettingError
from popo_lightning.model.attention_rows import PackedRows, packed_rows

PACKED = "popo_packed"  # name of this file's attention in transformers
BLOCK = 128  # tokens per block of the mask, in queries and in keys
INSTALLED = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def check_attention(attention: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raises SettingError for an implementation that is not installed, or cannot train on this device in this dtype.

    Args:
        attention: Value of model.attention.
        device: Device that the policy is trained on.
        dtype: Type that the policy computes in.
    """
    if attention is None or attention in ("sdpa", "eager"):
        return
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


def register_attention(name: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Registers an attention that takes sdpa's masks with transformers, for this process."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def use_packed_attention(model: Any) -> None:
    """Lets a transformers model take packed tokens. With any other mask, or none, it computes as with sdpa."""
    register_attention(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)


def keep_graphs_whole() -> None:
    """Stops torch.compile from splitting what it compiles within a pass of DDP, for this process.

    It splits by DDP's buckets, and older versions refuse flex_attention there (DDPOptimizer in
    torch/_dynamo/backends/distributed.py). Layers are compiled one by one, so DDP sends gradients during the backward
    pass all the same.
    """
    import torch._dynamo.config

    torch._dynamo.config.optimize_ddp = False


# -- what a token sees ---------------------------------------------------------------------------------------------


class PackedMask(BlockMask):
    """A block mask. For attention on a CPU it holds the rows instead of blocks."""

    rows: PackedRows | None


def flat_mask(segments: Tensor) -> PackedMask:
    """Makes the attention mask of a pass whose tokens follow one another without padding.

    Args:
        segments: (S, L) 0 for the prompt, 1, 2, ... for its responses, -1 for padding at the right.

    Returns:
        A mask of shape (1, 1, N, N). N is the number of tokens without padding, on CUDA rounded up to whole blocks.
    """
    if segments.is_cuda:
        return block_mask(segments, BLOCK)
    rows = packed_rows(segments)
    tokens = len(rows.places)
    # A single block keeps transformers from making its own mask.
    block = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=segments.device)
    mask: PackedMask = PackedMask.from_kv_blocks(block[0] + 1, block, BLOCK_SIZE=tokens, seq_lengths=(tokens, tokens))
    mask.rows = rows
    return mask


def block_mask(segments: Tensor, multiple: int = 1) -> PackedMask:
    """Makes :func:`flat_mask` by blocks.

    Args:
        segments: (S, L) segments as for :func:`flat_mask`.
        multiple: The number of tokens is rounded up to a multiple of this, by tokens that see only one another.
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
    """Returns ((N,), (N,)): each token's segment number, counted over all texts, and that of its text's prompt."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[1:] = (segments[1:] != segments[:-1]) | (text[1:] != text[:-1])
    own = begins.cumsum(0) - 1
    first = torch.ones_like(begins)
    first[1:] = text[1:] != text[:-1]
    return own, own[first][first.cumsum(0) - 1]


def _block_mask(own: Tensor, prompt: Tensor) -> PackedMask:
    """Makes the mask from segment numbers. They never decrease, so a block's first and last token decide about it."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (own[query] == own[key]) | (prompt[query] == own[key])
        return (query >= key) & same

    tokens = len(own)
    first = torch.arange(0, tokens, BLOCK, device=own.device)
    last = (first + BLOCK - 1).clamp(max=tokens - 1)
    low, high, of, of_last = own[first], own[last], prompt[first], prompt[last]
    earlier = torch.ones(len(first), len(first), dtype=torch.bool, device=own.device).tril_(-1)
    row, column = slice(None), None
    # In a block of queries, only the first text and its first segment can have begun in an earlier block.
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
    """Converts (Q, K), true for listed blocks, to ((1, 1, Q) their number, (1, 1, Q, K) key indices, listed first)."""
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
    """Computes attention, with the arguments of transformers' attention functions.

    Args:
        module: The layer's attention module.
        query: (B, heads, N, D) queries.
        key: (B, key heads, N, D) keys; several query heads may share one key head.
        value: (B, key heads, N, V) values, where V may differ from D.
        attention_mask: A `flat_mask`, or any mask that sdpa takes.
        scaling: Factor of the scores; None for 1 / sqrt(D).
        dropout: Dropout probability, used only by sdpa.
        others: Further arguments of sdpa.

    Returns:
        (B, N, heads, V) outputs, and None for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    dtype = computed_in(value.device, value.dtype)  # autocast casts sdpa's arguments, but not flex_attention's
    query, key, value = (each.to(dtype) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, PackedMask) and attention_mask.rows is not None:
        return over_rows(query, key, value, attention_mask.rows, scale), None
    grouped = query.shape[1] != key.shape[1]
    # Inside a compiled layer it is compiled with the layer. On a CPU the plain version needs no C++ compiler.
    plain = query.device.type == "cpu" or torch.compiler.is_compiling()
    flex: Any = flex_attention if plain else _compiled_flex()
    found = flex(query, key, value, block_mask=attention_mask, scale=scale, enable_gqa=grouped)
    return found.transpose(1, 2).contiguous(), None


def computed_in(device: torch.device, own: torch.dtype) -> torch.dtype:
    """Returns the dtype in which autocast multiplies matrices on a device; without autocast, their own dtype."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own


@cache
def _compiled_flex() -> Any:
    keep_graphs_whole()
    # dynamic: passes have any number of tokens, and static compilation would take half a minute for each new number. It
    # is a multiple of BLOCK, so no pass is short enough for the decoding kernel.
    return torch.compile(flex_attention, dynamic=True)


def over_rows(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float) -> Tensor:
    """Computes attention separately for each row, in rectangles of rows of about equal length.

    Args:
        query: (1, heads, N, D) queries.
        key: (1, key heads, N, D) keys.
        value: (1, key heads, N, V) values.
        rows: Rows that the N tokens form.
        scale: Factor of the scores.

    Returns:
        (1, N, heads, V) outputs of the queries' dtype, also under autocast.
    """
    heads, tokens = query.shape[1:3]
    # On a CPU the kernel is faster in float32 than in bfloat16, and does not round.
    exact = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
    # (N, heads x width): embedding gathers rows of a matrix, and its backward pass sums a row's gradients fastest.
    flat = [each[0].transpose(0, 1).reshape(tokens, -1).to(exact) for each in (query, key, value)]
    grouped, found = heads != key.shape[1], []
    for each in rows.rectangles:
        q, k, v = (
            embedding(places, of).unflatten(-1, (whole.shape[1], -1)).transpose(1, 2)
            for places, of, whole in zip((each.queries, each.keys, each.keys), flat, (query, key, value), strict=True)
        )
        with torch.autocast(query.device.type, enabled=False):  # autocast would round them again
            seen = scaled_dot_product_attention(q, k, v, attn_mask=each.mask.to(exact), scale=scale, enable_gqa=grouped)
        found.append(seen.transpose(1, 2).flatten(2).flatten(0, 1))
    return embedding(rows.places, torch.cat(found)).view(1, tokens, heads, -1).to(query.dtype)
