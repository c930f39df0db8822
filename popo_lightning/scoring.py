"""From padded rows to the states and log-probs of their response tokens: one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from popo_lightning.logprobs import token_logprobs
from popo_lightning.minibatch import PaddedRows
from popo_lightning.model_folder import image_marks, sees_images, unseen_image
from popo_lightning.ranks import several_ranks


def response_states(base: Any, rows: PaddedRows) -> Tensor:
    """Hidden states in which the response tokens are chosen.

    Args:
        base: A transformers model without its output head.
        rows: R padded rows on its device.

    Returns:
        (N, H), the state before each of the N response tokens, row after row.
    """
    # Right padding and a causal mask: a response never sees what is padded, in whatever attention.
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask.long(), "use_cache": False}
    if rows.images:
        inputs |= rows.images | {"mm_token_type_ids": image_marks(base.config, rows.input_ids)}
    hidden = base(**inputs).last_hidden_state
    if not rows.images and sees_images(base.config) and several_ranks():
        hidden = hidden + unseen_image(base, rows.input_ids.device, hidden.dtype)
    flat: Tensor = hidden[:, :-1][rows.is_response[:, 1:]]  # position t predicts token t + 1
    return flat


def response_logprobs(
    model: nn.Module,
    rows: PaddedRows,
    temperature: float,
    forbidden_token_ids: Sequence[int],
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens.

    Args:
        model: A causal language model of transformers.
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
    )
    return placed(logp, rows.mask), placed(entropy, rows.mask)


def placed(flat: Tensor, mask: Tensor) -> Tensor:
    """(N,) values at the N true places of a (R, T) mask, zero elsewhere.

    PaddedRows.mask and .is_response list a row's response tokens in the same order.
    """
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
