"""Draws tokens from logits with precomputed uniform numbers, independent of generator state, batch and position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from popo_lightning.engines.base import Sampling

BRANCHES = 64  # parts into which a vocabulary, and then the part with the token, is divided


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(len(seeds), count) float64 numbers in [0, 1); each row comes from its own generator.

    Args:
        seeds: Seed of each row, at least 0. Its first numbers do not depend on `count`.
        count: Numbers per row.
    """
    drawn = np.empty((len(seeds), count))
    for row, seed in enumerate(seeds):
        np.random.Generator(np.random.PCG64(seed)).random(out=drawn[row])
    return torch.from_numpy(drawn)


def draw(
    logits: Tensor, uniform: Tensor, sampling: Sampling, forbidden: Tensor, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token of each distribution: the inverse of its cumulative distribution at the given number.

    Args:
        logits: (R, V) float32; overwritten.
        uniform: (R,) float64 in [0, 1).
        sampling: Temperature (0 takes the most likely token), top_k and top_p.
        forbidden: (F,) tokens that get probability 0.
        temperatures: (R,) temperature of each row; used only if sampling has a temperature spread.

    Returns:
        ((R,), (R,)) tokens, and their float32 log-probs under the distribution that was drawn from.
    """
    if len(forbidden):
        logits.index_fill_(-1, forbidden, -torch.inf)
    if sampling.temperature_spread and temperatures is not None:
        logits.div_(temperatures[:, None])
    elif sampling.temperature not in (0, 1):
        logits.div_(sampling.temperature)
    if sampling.temperature != 0:
        logits = cut_tail(logits, sampling)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    if sampling.temperature == 0:
        token, total = weights.argmax(-1), weights.sum(-1, dtype=torch.float64)
    else:
        token, total = invert(weights, uniform)
    chosen = weights.gather(-1, token[:, None]).squeeze(-1)
    return token, chosen.double().div_(total).log_().float()


def invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the first token of each row at which the cumulative weight exceeds a share of the row's total.

    The sums are float64, which is precise enough for 150,000 tokens. They are taken over parts of the vocabulary, then
    over parts of the part that was found, and so on: the weights are read once, and no tensor as large is written.

    Args:
        weights: (R, V) float32, at least 0, with a positive one in each row. A weight of 0 is never drawn.
        uniform: (R,) float64 in [0, 1), the share of the total.

    Returns:
        ((R,), (R,)) tokens and float64 totals.
    """
    triangle = torch.ones(BRANCHES, BRANCHES, dtype=torch.float64, device=weights.device).triu_()
    first: Tensor | int = 0
    total: Tensor | None = None
    rest = uniform
    while True:
        part = -(-weights.shape[1] // BRANCHES)
        if missing := -weights.shape[1] % part:
            weights = torch.nn.functional.pad(weights, (0, missing))
        parts = weights.unflatten(1, (-1, part))
        sums = parts.sum(-1, dtype=torch.float64) if part > 1 else weights.double()
        if total is None:
            total = sums.sum(-1)
            rest = uniform * total
        found, rest = _first_beyond(sums, rest, triangle)
        first = first + found * part
        if part == 1:
            return first, total
        weights = parts.gather(1, found[:, None, None].expand(-1, 1, part)).squeeze(1)


def _first_beyond(weights: Tensor, share: Tensor, triangle: Tensor) -> tuple[Tensor, Tensor]:
    """Index at which the cumulative weight exceeds the share, and the rest of the share for inside that part.

    A product with a triangle of ones replaces cumsum, which is not deterministic for floats on CUDA in torch.
    """
    size = weights.shape[1]
    reached = (weights @ triangle[:size, :size]) * (weights > 0)  # a weight of 0 never exceeds the share
    share = torch.minimum(share, reached.amax(-1) * (1 - 2**-52))  # after rounding, some weight must still exceed it
    found = (reached > share[:, None]).byte().argmax(-1)
    before = (reached - weights).gather(-1, found[:, None]).squeeze(-1)
    return found, (share - before).clamp_(min=0)


def cut_tail(logits: Tensor, sampling: Sampling) -> Tensor:
    """(R, V) logits with the tokens outside top_k and top_p at -inf."""
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass before each token
        outside = before >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, places, outside), -torch.inf)
    return logits
