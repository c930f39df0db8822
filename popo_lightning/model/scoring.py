"""Computes the states and log-probs of padded rows' response tokens in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from popo_lightning.core.ranks import joined
from popo_lightning.model.attention import PACKED, computed_in, flat_mask
from popo_lightning.model.loading import mm_token_type_ids, sees_images, zero_through_vision_tower
from popo_lightning.model.logit_form import PLAIN
from popo_lightning.model.logprobs import token_logprobs
from popo_lightning.model.packing import ignores_right_padding
from popo_lightning.model.padded_rows import PaddedRows, dummy_rows


def response_states(base: Any, rows: PaddedRows) -> Tensor:
    """Computes the hidden states from which the response tokens are predicted.

    Args:
        base: A transformers model without its output head.
        rows: R padded rows on its device.

    Returns:
        (N, H) the state before each of the N response tokens, row after row.
    """
    if base.config._attn_implementation == PACKED and not _takes_causal_kernel(base, rows):
        return _of_flat_tokens(base, rows)
    inputs: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
    if rows.segments is not None:
        mask = packed_mask(rows.segments, _compute_dtype(base, rows.segments.device))
        inputs |= {"attention_mask": mask, "position_ids": rows.positions}
    elif not ignores_right_padding(base):
        inputs |= {"attention_mask": rows.attention_mask.long()}
    if rows.images:
        inputs |= rows.images | {"mm_token_type_ids": mm_token_type_ids(base.config, rows.input_ids)}
    blind = not rows.images and sees_images(base.config) and joined()
    device = rows.input_ids.device
    # Before the decoder, like an image: FSDP2 gathers and reduces layer by layer, on all ranks in the same order.
    zero = zero_through_vision_tower(base, device, _compute_dtype(base, device)) if blind else None
    hidden = base(**inputs).last_hidden_state
    if zero is not None:
        hidden = hidden + zero
    flat: Tensor = hidden.flatten(0, 1)[rows.source]  # a prompt's last state, once for each of its responses
    return flat


def _takes_causal_kernel(base: Any, rows: PaddedRows) -> bool:
    """Returns whether a pass is a single row that needs no mask, for which a causal kernel without mask is fastest.

    On CUDA no fast kernel takes float32 with shared key heads; there sdpa would compute a matrix of all scores.
    """
    alone = rows.segments is None and len(rows.input_ids) == 1
    device = rows.input_ids.device
    return alone and (device.type == "cpu" or _compute_dtype(base, device) != torch.float32)


def _of_flat_tokens(base: Any, rows: PaddedRows) -> Tensor:
    """Computes :func:`response_states` from tokens without padding between them."""
    kept, device = rows.attention_mask, rows.input_ids.device
    segments = rows.segments
    if segments is None:
        segments = rows.is_response.long().masked_fill(~kept, -1)
    mask = flat_mask(segments)
    filled = mask.shape[-1] - int(kept.sum())
    positions = torch.arange(kept.shape[1], device=device).expand_as(kept) if rows.positions is None else rows.positions
    ids, positions = (pad(each[kept], (0, filled))[None] for each in (rows.input_ids, positions))
    hidden = base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    place = kept.flatten().cumsum(0) - 1
    states: Tensor = hidden[0, place[rows.source]]
    return states


def packed_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Makes the additive attention mask of packed rows: 0 where a token sees another, otherwise -inf.

    A token sees the prompt and its own response, up to itself. Padding also sees something, or its states would be NaN.
    The mask is additive, because attention would convert a boolean mask in every layer, and keep the result.

    Args:
        segments: (S, L) 0 for the prompt, 1, 2, ... for its responses, -1 for padding.
        dtype: Type that attention computes in.

    Returns:
        (S, 1, L, L) mask.
    """
    seen = (segments[:, :, None] == segments[:, None, :]) | (segments == 0)[:, None, :]
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~seen.tril_(), -torch.inf)[:, None]


def _compute_dtype(base: Any, device: torch.device) -> torch.dtype:
    return computed_in(device, base.get_input_embeddings().weight.dtype)


def response_logprobs(
    model: nn.Module,
    rows: PaddedRows,
    temperature: float,
    forbidden_token_ids: Sequence[int],
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Computes log-probs and entropies of the response tokens.

    Args:
        model: A transformers causal language model.
        rows: R padded rows on its device.
        temperature: The sampling temperature.
        forbidden_token_ids: Tokens the engine cannot sample.
        entropy_gradient: Whether the entropies carry a gradient.

    Returns:
        ((R, T), (R, T)) float32, zero at padding.
    """
    lm: Any = model
    logp, entropy = token_logprobs(
        response_states(lm.base_model, rows),
        lm.get_output_embeddings(),
        rows.input_ids[rows.is_response],
        temperature,
        forbidden_token_ids,
        entropy_gradient=entropy_gradient,
        form=getattr(model, "logit_form", PLAIN),
    )
    return scatter_to_mask(logp, rows.mask), scatter_to_mask(entropy, rows.mask)


def scatter_to_mask(flat: Tensor, mask: Tensor) -> Tensor:
    """Places (N,) or (N, O) values at the N true entries of a (R, T) mask, and zero elsewhere.

    PaddedRows.mask and .is_response list a row's response tokens in the same order.
    """
    further = flat.shape[1:]
    empty = torch.zeros((*mask.shape, *further), dtype=flat.dtype, device=flat.device)
    return empty.masked_scatter(mask[..., None] if further else mask, flat)


@torch.no_grad()
def scores_by_row(
    passes: Sequence[PaddedRows], score: Callable[[PaddedRows], Tensor], device: torch.device, min_passes: int
) -> list[Tensor]:
    """Returns (T,) scores of every row, on the CPU, in the order of the minibatch.

    Args:
        passes: Padded rows of a minibatch.
        score: Computes (R, T) scores of a pass's rows.
        device: Device for the computation.
        min_passes: Minimum number of passes. With sharded weights each pass is a collective, so missing ones are made
            with one token.
    """
    found: dict[int, Tensor] = {}
    for part in passes:
        scores = score(part.to(device)).cpu()
        found |= {index: row[mask] for index, row, mask in zip(part.index.tolist(), scores, part.mask, strict=True)}
    for _ in range(min_passes - len(passes)):
        score(dummy_rows().to(device))
    return [found[index] for index in sorted(found)]
