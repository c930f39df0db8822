"""The tensors of one forward pass: rows, alone or several behind one copy of their prompt, padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Row


@dataclass(frozen=True)
class PaddedRows:
    """R rows as S sequences of at most L tokens: a prompt, and the responses of one row or of several.

    Sequences are right-padded. The rows have the order in which their responses stand in the sequences, so the N true
    places of ``is_response`` and those of ``mask`` are the same tokens in the same order.
    """

    index: Tensor  # (R,) place in the minibatch
    input_ids: Tensor  # (S, L)
    attention_mask: Tensor  # (S, L) bool: no padding
    is_response: Tensor  # (S, L) bool: tokens that were sampled
    segments: Tensor | None  # (S, L) 0 prompt, 1, 2, ... its responses, -1 padding. None: every sequence is one row
    positions: Tensor | None  # (S, L) in the text that the engine saw, where there are segments
    source: Tensor  # (N,) flat places in (S, L) of the states in which the response tokens are chosen
    mask: Tensor  # (R, T) bool: response tokens, response-aligned
    behave_logp: Tensor  # (R, T)
    prox_logp: Tensor | None  # (R, T)
    prox_alpha: Tensor | None  # (R, 1)
    advantages: Tensor  # (R, 1) or (R, T)
    loss_weight: Tensor  # (R,)
    fresh: Tensor  # (R,) bool
    age: Tensor  # (R,) policy versions
    values: Tensor | None  # (R, T) of the critic before the step
    returns: Tensor | None  # (R, T)
    images: dict[str, Tensor]  # of all rows one after the other, by the model's argument names; empty for text

    def to(self, device: torch.device) -> PaddedRows:
        """All tensors on one device."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "images"}
        moved = {name: t.to(device, non_blocking=True) for name, t in found.items() if t is not None}
        return replace(self, **moved, images={name: t.to(device, non_blocking=True) for name, t in self.images.items()})


def pad_rows(rows: Sequence[Row]) -> PaddedRows:
    """Every row a sequence of its own."""
    return pad_sequences([[row] for row in rows])


def pad_sequences(sequences: Sequence[Sequence[Row]]) -> PaddedRows:
    """Right-pads sequences into one rectangle. Padding value 0 where no mask says what counts.

    Args:
        sequences: Rows behind one copy of their prompt each; none is empty.
    """
    rows = [row for sequence in sequences for row in sequence]
    ids = [torch.cat((sequence[0].prompt_ids, *(row.response.token_ids for row in sequence))) for sequence in sequences]
    input_ids = pad_sequence(ids, batch_first=True)
    segments, positions = _places(sequences)
    is_response = segments > 0
    lengths = torch.tensor([len(row.response.token_ids) for row in rows])
    behave_logp = pad_sequence([row.response.behave_logp for row in rows], batch_first=True)
    packed = len(rows) > len(sequences)
    return PaddedRows(
        index=torch.tensor([row.index for row in rows]),
        input_ids=input_ids,
        attention_mask=segments >= 0,
        is_response=is_response,
        segments=segments if packed else None,
        positions=positions if packed else None,
        source=_source(sequences, positions, is_response),
        mask=torch.arange(behave_logp.shape[1]) < lengths[:, None],
        behave_logp=behave_logp,
        prox_logp=_padded([row.prox_logp for row in rows]),
        prox_alpha=None if rows[0].prox_alpha is None else torch.tensor([[row.prox_alpha] for row in rows]),
        advantages=_advantages(rows),
        loss_weight=torch.tensor([row.loss_weight for row in rows]),
        fresh=torch.tensor([row.fresh for row in rows]),
        age=torch.tensor([row.age for row in rows]),
        values=_padded([row.value for row in rows]),
        returns=_padded([row.returns for row in rows]),
        images=_images(rows),
    )


def _places(sequences: Sequence[Sequence[Row]]) -> tuple[Tensor, Tensor]:
    """((S, L), (S, L)): which part of its sequence a token belongs to, and where it stands in its row's text."""
    segments, positions = [], []
    for sequence in sequences:
        prompt = len(sequence[0].prompt_ids)
        lengths = torch.tensor([prompt, *(len(row.response.token_ids) for row in sequence)])
        segment = torch.arange(len(lengths)).repeat_interleave(lengths)
        # a response begins where the prompt ends, independent of what is packed before it
        shift = lengths.cumsum(0) - lengths - prompt
        shift[0] = 0
        segments.append(segment)
        positions.append(torch.arange(len(segment)) - shift[segment])
    return pad_sequence(segments, batch_first=True, padding_value=-1), pad_sequence(positions, batch_first=True)


def _source(sequences: Sequence[Sequence[Row]], positions: Tensor, is_response: Tensor) -> Tensor:
    """(N,) flat places of the tokens before the response tokens: before a response's first is its prompt's last."""
    prompts = torch.tensor([len(sequence[0].prompt_ids) for sequence in sequences])[:, None]
    before = torch.where(positions == prompts, prompts, torch.arange(positions.shape[1])) - 1
    start = torch.arange(len(positions))[:, None] * positions.shape[1]
    return (start + before)[is_response]


def _padded(values: Sequence[Tensor | None]) -> Tensor | None:
    """(R, T) where every row has (T,) values."""
    found = [value for value in values if value is not None]
    return pad_sequence(found, batch_first=True) if len(found) == len(values) else None


def _advantages(rows: Sequence[Row]) -> Tensor:
    """(R, 1) where each response has one advantage, (R, T) where each token has."""
    if all(row.advantage.dim() == 0 for row in rows):
        return torch.stack([row.advantage for row in rows])[:, None].float()
    return pad_sequence([row.advantage.float().expand(len(row.response.token_ids)) for row in rows], batch_first=True)


def _images(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Image tensors of all rows, in row order: as many copies of a prompt's image as there are responses to it."""
    found = [row.images for row in rows if row.images]
    return {name: torch.cat([images[name] for images in found]) for name in found[0]} if found else {}


def one_token() -> PaddedRows:
    """The smallest pass there is, for ranks that have nothing to score while others have."""
    token = torch.zeros(1, dtype=torch.long)
    return pad_rows([Row(0, token, Response(token, torch.zeros(1), "stop"), torch.zeros(()))])


def proximal_logprobs(part: PaddedRows, logp: Tensor) -> Tensor:
    """(R, T) centre of the trust region: as recorded, or between behave and the policy, or the policy itself.

    Without anything recorded no step has been taken since the iteration began, and the policy is the centre.
    """
    if part.prox_alpha is not None:
        return torch.lerp(part.behave_logp, logp, part.prox_alpha)
    return logp if part.prox_logp is None else part.prox_logp
