"""The tensors of one forward pass: rows, alone or several behind one copy of their prompt, padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import EXTRA, Row, response_lengths
from popo_lightning.objectives.inputs import MinibatchTokens, ObjectiveInputs

OF_MINIBATCH = [each.name for each in fields(MinibatchTokens)]


@dataclass(frozen=True)
class PaddedRows:
    """R rows as S sequences of at most L tokens: a prompt, and the responses of one row or of several.

    Sequences are right-padded. The rows are ordered as their responses are in the sequences, so the N true entries of
    ``is_response`` and those of ``mask`` are the same tokens in the same order.
    """

    index: Tensor  # (R,) index of the row in the minibatch
    input_ids: Tensor  # (S, L)
    attention_mask: Tensor  # (S, L) bool, false at padding
    is_response: Tensor  # (S, L) bool, true at sampled tokens
    segments: Tensor | None  # (S, L) 0 prompt, 1, 2, ... its responses, -1 padding. None: every sequence is one row
    positions: Tensor | None  # (S, L) positions in the text that the engine saw; None without segments
    source: Tensor  # (N,) flat indices into (S, L) of the states before the response tokens
    mask: Tensor  # (R, T) bool: response tokens, response-aligned
    age: Tensor  # (R,) policy versions
    columns: dict[str, Tensor]  # (R,), (R, 1) or (R, T), by the field of ObjectiveInputs that they fill
    images: dict[str, Tensor] = field(default_factory=dict)  # image inputs of all rows, by the model's argument names

    @property
    def fresh(self) -> Tensor:
        """(R,) bool, true if the present policy version sampled the row."""
        return self.age == 0

    def to(self, device: torch.device) -> PaddedRows:
        """Returns these rows with all tensors on one device."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved(own), columns=moved(self.columns), images=moved(self.images))

    def inputs(self, logp: Tensor, **of_pass: Any) -> ObjectiveInputs:
        """Returns the inputs of a loss, see :func:`objective_inputs`."""
        return objective_inputs(self.columns, self.mask, self.fresh, logp, **of_pass)


@dataclass(frozen=True)
class PassOutputs:
    """Outputs of one forward pass over R rows of T tokens, zero at padding.

    Args:
        rows: The rows, on the policy's device.
        logp: (R, T) log-probs under the policy, float32.
        entropy: (R, T) entropies in nats.
        ref_logp: (R, T) log-probs under the frozen reference, if a regularizer needs them.
        values: (R, T) or (R, T, O) output of the critic, if there is one.
    """

    rows: PaddedRows
    logp: Tensor
    entropy: Tensor
    ref_logp: Tensor | None = None
    values: Tensor | None = None


def pad_rows(rows: Sequence[Row]) -> PaddedRows:
    """Pads rows, each as its own sequence."""
    return pad_sequences([[row] for row in rows])


def pad_sequences(sequences: Sequence[Sequence[Row]]) -> PaddedRows:
    """Right-pads sequences into one rectangle. The padding value is 0; masks say which entries count.

    Args:
        sequences: Sequences of rows behind one copy of their prompt; none is empty.
    """
    rows = [row for sequence in sequences for row in sequence]
    ids = [torch.cat((sequence[0].prompt_ids, *(row.response.token_ids for row in sequence))) for sequence in sequences]
    input_ids = pad_sequence(ids, batch_first=True)
    segments, positions = _places(sequences)
    is_response = segments > 0
    packed = len(rows) > len(sequences)
    return PaddedRows(
        index=torch.tensor([row.index for row in rows]),
        input_ids=input_ids,
        attention_mask=segments >= 0,
        is_response=is_response,
        segments=segments if packed else None,
        positions=positions if packed else None,
        source=_source(sequences, positions, is_response),
        mask=response_mask(rows),
        age=torch.tensor([row.age for row in rows]),
        columns=columns_of(rows),
        images=_images(rows),
    )


def response_mask(rows: Sequence[Row]) -> Tensor:
    """Returns (R, T), true at response tokens."""
    lengths = response_lengths(rows)
    return torch.arange(int(lengths.max())) < lengths[:, None]


def columns_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Returns the recorded quantities of rows, padded, by the field of ObjectiveInputs that they fill.

    A quantity per token is (R, T), one per response (R, 1). Rows without advantages have 0.

    Args:
        rows: One row or more, all with the same names of tensors.
    """
    columns = {
        "behave_logp": pad_sequence([row.response.behave_logp for row in rows], batch_first=True),
        "advantages": torch.zeros(len(rows), 1),
        "loss_weight": torch.tensor([row.loss_weight for row in rows]),
    }
    return columns | {name: _column([row.tensors[name].float() for row in rows], rows) for name in rows[0].tensors}


def _column(tensors: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """Returns (R, 1) if every row has one number, or (R, T) if any row has one per token."""
    if all(tensor.dim() == 0 for tensor in tensors):
        return torch.stack(list(tensors))[:, None]
    of_tokens = [each.expand(len(row.response.token_ids)) for each, row in zip(tensors, rows, strict=True)]
    return pad_sequence(of_tokens, batch_first=True)


def _places(sequences: Sequence[Sequence[Row]]) -> tuple[Tensor, Tensor]:
    """Returns ((S, L) segment of each token in its sequence, (S, L) position of each token in its row's text)."""
    segments, positions = [], []
    for sequence in sequences:
        prompt = len(sequence[0].prompt_ids)
        lengths = torch.tensor([prompt, *(len(row.response.token_ids) for row in sequence)])
        segment = torch.arange(len(lengths)).repeat_interleave(lengths)
        # A response's positions follow the prompt's, regardless of the responses packed before it.
        shift = lengths.cumsum(0) - lengths - prompt
        shift[0] = 0
        segments.append(segment)
        positions.append(torch.arange(len(segment)) - shift[segment])
    return pad_sequence(segments, batch_first=True, padding_value=-1), pad_sequence(positions, batch_first=True)


def _source(sequences: Sequence[Sequence[Row]], positions: Tensor, is_response: Tensor) -> Tensor:
    """Returns (N,) flat indices of the tokens before the response tokens; a prompt's last precedes each response."""
    prompts = torch.tensor([len(sequence[0].prompt_ids) for sequence in sequences])[:, None]
    before = torch.where(positions == prompts, prompts, torch.arange(positions.shape[1])) - 1
    start = torch.arange(len(positions))[:, None] * positions.shape[1]
    return (start + before)[is_response]


def _images(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Returns the image tensors of all rows, in row order: one copy of a prompt's image per response."""
    found = [row.images for row in rows if row.images]
    return {name: torch.cat([images[name] for images in found]) for name in found[0]} if found else {}


def dummy_rows() -> PaddedRows:
    """Returns the smallest possible pass, for ranks that have nothing to score while others have."""
    token = torch.zeros(1, dtype=torch.long)
    return pad_rows([Row(0, token, Response(token, torch.zeros(1), "stop"))])


def objective_inputs(
    columns: dict[str, Tensor], mask: Tensor, fresh: Tensor, logp: Tensor, **of_pass: Any
) -> ObjectiveInputs:
    """Combines the recorded quantities of rows with the outputs of a forward pass.

    If nothing is recorded about prox, no step has been taken since the iteration began, so prox is the policy.

    Args:
        columns: Quantities by :func:`columns_of`.
        mask: (R, T), true at response tokens.
        fresh: (R,), true for rows sampled this iteration.
        logp: (R, T) log-probs under the policy, with gradient.
        of_pass: Further fields of ObjectiveInputs, such as `entropy`, `ref_logp` and `version`.
    """
    known: dict[str, Any] = {"prox_logp": logp.detach()} | columns | of_pass
    if (alpha := known.pop("prox_alpha", None)) is not None:
        known["prox_logp"] = torch.lerp(known["behave_logp"], logp.detach(), alpha)
    extra = {name.removeprefix(EXTRA): known.pop(name) for name in list(known) if name.startswith(EXTRA)}
    return ObjectiveInputs(logp=logp, mask=mask, fresh=fresh, extra=extra, **known)


def flat_tokens(rows: Sequence[Row], logp: Sequence[Tensor]) -> list[Tensor]:
    """Returns flat (N,) columns over all response tokens, in the order of MinibatchTokens' fields; fresh is 0 or 1.

    Args:
        rows: Rows of a minibatch.
        logp: (T,) log-probs of each row under the policy.
    """
    if not rows:
        return [torch.empty(0)] * len(OF_MINIBATCH)
    mask, fresh = response_mask(rows), torch.tensor([[float(row.fresh)] for row in rows])
    inputs = objective_inputs(columns_of(rows), mask, fresh, pad_sequence(list(logp), batch_first=True))
    columns = [getattr(inputs, name) for name in OF_MINIBATCH]
    return [column.expand(mask.shape)[mask] for column in columns]
