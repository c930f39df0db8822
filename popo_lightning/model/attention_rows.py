"""Rows of packed tokens as rectangles of about equal length, for attention that computes each row separately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A rectangle takes rows down to this fraction of its longest row. It also takes shorter ones until it has this many
# pairs of tokens, because below that a further rectangle costs more than the padding it saves.
MIN_SHARE, MIN_PAIRS = 0.75, 2**16


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens. Each sees the earlier ones and the whole prompt before them."""

    start: int
    tokens: int
    prompt: int = 0  # index of the prompt's first token
    before: int = 0  # number of prompt tokens; 0 for a prompt itself

    @property
    def length(self) -> int:
        """Number of keys."""
        return self.before + self.tokens


@dataclass(frozen=True)
class Rectangle:
    """R pieces of at most T tokens behind prompts of at most P, padded to queries of T and keys of P + T."""

    queries: Tensor  # (R, T) indices of the query tokens; 0 at padding
    keys: Tensor  # (R, P + T) indices of the key tokens: prompt and padding, piece and padding
    order: Tensor  # (R T,) indices of the query tokens, flat; -1 at padding
    mask: Tensor  # (R, 1, T, P + T) added to the scores: 0 where a query sees a key, else -inf


@dataclass(frozen=True)
class PackedRows:
    """The rows of a pass."""

    rectangles: list[Rectangle]
    places: Tensor  # (N,) index of each token among the queries of all rectangles in turn


def packed_rows(segments: Tensor) -> PackedRows:
    """Returns the rows of a pass whose tokens follow one another without padding.

    Args:
        segments: (S, L) 0 for the prompt, 1, 2, ... for its responses, -1 for padding at the right.
    """
    found = rectangles(segments)
    order = torch.cat([each.order for each in found])
    return PackedRows(found, order.argsort()[int((order < 0).sum()) :])


def rectangles(segments: Tensor) -> list[Rectangle]:
    """Returns the rectangles of :func:`packed_rows`."""
    parts = torch.zeros(len(segments), int(segments.max()) + 2, dtype=torch.long, device=segments.device)
    parts.scatter_add_(1, segments + 1, torch.ones_like(segments))
    prompts, responses, start = [], [], 0
    for prompt_tokens, *counts in parts[:, 1:].tolist():
        prompt = Piece(start, prompt_tokens)
        prompts.append(prompt)
        start += prompt.tokens
        for tokens in filter(None, counts):
            responses.append(Piece(start, tokens, prompt.start, prompt.tokens))
            start += tokens
    return [_rectangle(pieces, segments.device) for kind in (prompts, responses) for pieces in _alike(kind)]


def _alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Groups pieces of about equal length, longest first."""
    found: list[list[Piece]] = []
    pairs = 0
    for piece in sorted(pieces, key=lambda piece: piece.length, reverse=True):
        if not found or (pairs > MIN_PAIRS and piece.length < MIN_SHARE * found[-1][0].length):
            found.append([])
            pairs = 0
        found[-1].append(piece)
        pairs += piece.tokens * piece.length
    return found


def _rectangle(pieces: Sequence[Piece], device: torch.device) -> Rectangle:
    numbers = [[p.start, p.tokens, p.prompt, p.before] for p in pieces]
    start, tokens, prompt, before = torch.tensor(numbers, device=device).T
    within = torch.arange(max(p.tokens for p in pieces), device=device)
    of_prompt = torch.arange(max(p.before for p in pieces), device=device)
    there = within < tokens[:, None]
    queries = (start[:, None] + within) * there
    of_its_own = of_prompt < before[:, None]
    return Rectangle(
        queries=queries,
        keys=torch.cat(((prompt[:, None] + of_prompt) * of_its_own, queries), 1),
        order=queries.masked_fill(~there, -1).flatten(),
        mask=_mask(of_its_own, len(within)),
    )


def _mask(of_its_own: Tensor, tokens: int) -> Tensor:
    """Makes the mask (R, 1, T, P + T). Padding sees something, or it would be NaN; no token sees padding."""
    rows, before = of_its_own.shape
    mask = torch.zeros(rows, 1, tokens, before + tokens, device=of_its_own.device)
    mask[..., :before].masked_fill_(~of_its_own[:, None, None], -torch.inf)
    mask[..., before:].masked_fill_(
        torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).triu_(1), -torch.inf
    )
    return mask
