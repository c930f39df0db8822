"""Groups of one optimizer step, and the padded rows of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popo_lightning.groups import Group, Response


class Minibatch:
    """The groups of one optimizer step: one Lightning batch.

    Not a dataclass on purpose: Lightning copies dataclasses while moving them to a device, and the proximal
    log-probs must land on this very object.

    Args:
        groups: Whole groups; may be empty when a composer dropped more than it kept.
        version: Policy version at the start of the iteration: age of a group is ``version - group.version``.
        index: Position among the iteration's optimizer steps.
        part: Which share of the iteration's groups these are; several sweeps come back to it. Null: index.

    Attributes:
        prox_logp: One (T,) tensor a row; None: not computed (yet).
        prox_is_start: Whether prox_logp is of the policy that the iteration began with, which sampled the fresh rows.
        prox_share: One number a row: prox is this share of the way from behave to the policy, in log-probs. None:
            prox_logp holds.
        values: One (T,) tensor a row, of a critic at the start of the iteration. None: taken before the step.
    """

    def __init__(self, groups: Sequence[Group], version: int, index: int, part: int | None = None) -> None:
        self.groups = list(groups)
        self.version = version
        self.index = index
        self.part = index if part is None else part
        self.prox_logp: list[Tensor] | None = None
        self.prox_is_start = False
        self.prox_share: list[float] | None = None
        self.values: list[Tensor] | None = None

    @property
    def fresh(self) -> list[bool]:
        """Per group, whether the present policy version sampled it."""
        return [group.version == self.version for group in self.groups]

    @property
    def responses(self) -> list[Response]:
        """All rows, group after group."""
        return [response for group in self.groups for response in group.responses]

    @property
    def tokens(self) -> int:
        """Response tokens: this rank's share of the loss denominator."""
        return sum(group.tokens for group in self.groups)

    def rows(
        self,
        advantages: Sequence[Tensor] | None = None,
        values: Sequence[Tensor] | None = None,
        returns: Sequence[Tensor] | None = None,
    ) -> list[Row]:
        """One row per response; all arguments have one tensor per row, in the order of :attr:`responses`.

        Args:
            advantages: () for the whole response or (T,). None where only log-probs are wanted.
            values: (T,) of a critic before the step.
            returns: (T,) that the critic learns.
        """
        rows: list[Row] = []
        for group in self.groups:
            for response in group.responses:
                index = len(rows)
                rows.append(
                    Row(
                        index=index,
                        prompt_ids=group.prompt_ids,
                        response=response,
                        advantage=torch.zeros(()) if advantages is None else advantages[index],
                        prox_logp=None if self.prox_logp is None else self.prox_logp[index],
                        prox_share=None if self.prox_share is None else self.prox_share[index],
                        age=self.version - group.version_of(response),
                        loss_weight=group.loss_weight,
                        images=group.images,
                        value=None if values is None else values[index],
                        returns=None if returns is None else returns[index],
                    )
                )
        return rows

    def to_plain(self) -> dict[str, Any]:
        """Plain containers and tensors for the checkpoint."""
        return {
            "groups": [group.to_plain() for group in self.groups],
            "version": self.version,
            "index": self.index,
            "part": self.part,
            "prox_logp": self.prox_logp,
            "prox_is_start": self.prox_is_start,
            "prox_share": self.prox_share,
            "values": self.values,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Minibatch:
        """Inverse of :meth:`to_plain`."""
        groups = [Group.from_plain(group) for group in plain["groups"]]
        minibatch = cls(groups, plain["version"], plain["index"], plain.get("part"))
        minibatch.prox_logp, minibatch.prox_share = plain["prox_logp"], plain.get("prox_share")
        minibatch.prox_is_start = plain.get("prox_is_start", False)
        minibatch.values = plain.get("values")
        return minibatch


def deal(groups: Sequence[Group], version: int, minibatches: int, sweeps: int, random: Random) -> list[Minibatch]:
    """Shuffles groups, never splitting one, and deals them out evenly; the number of minibatches is fixed.

    Args:
        groups: Those of one iteration.
        version: Policy version.
        minibatches: Parts, of which some are empty where there are fewer groups.
        sweeps: Times the parts come, in the same order and with the same groups.
        random: Decides the order.
    """
    order = list(range(len(groups)))
    random.shuffle(order)
    dealt = [[groups[i] for i in order[part::minibatches]] for part in range(minibatches)]
    return [
        Minibatch(part, version, sweep * minibatches + place, place)
        for sweep in range(sweeps)
        for place, part in enumerate(dealt)
    ]


@dataclass(frozen=True)
class Row:
    """One response with everything its loss needs; ``index`` is its place in the minibatch."""

    index: int
    prompt_ids: Tensor
    response: Response
    advantage: Tensor
    prox_logp: Tensor | None = None
    prox_share: float | None = None
    age: int = 0
    loss_weight: float = 1.0
    images: dict[str, Tensor] = field(default_factory=dict)
    value: Tensor | None = None
    returns: Tensor | None = None

    @property
    def fresh(self) -> bool:
        """Whether the present policy version sampled it."""
        return self.age == 0

    @property
    def length(self) -> int:
        """Prompt and response tokens."""
        return len(self.prompt_ids) + len(self.response.token_ids)


@dataclass(frozen=True)
class PaddedRows:
    """R rows padded to one rectangle: L prompt and response tokens, of which at most T response tokens.

    Rows are right-padded: position t of ``input_ids`` is position t of the text, as the engine saw it.
    """

    index: Tensor  # (R,) place in the minibatch
    input_ids: Tensor  # (R, L)
    attention_mask: Tensor  # (R, L) bool
    is_response: Tensor  # (R, L) bool: tokens that were sampled
    mask: Tensor  # (R, T) bool: the same, response-aligned
    behave_logp: Tensor  # (R, T)
    prox_logp: Tensor | None  # (R, T)
    prox_share: Tensor | None  # (R, 1)
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
    """Right-pads rows into one rectangle. Padding value 0 everywhere; the masks say what counts."""
    prompt_lengths = torch.tensor([len(row.prompt_ids) for row in rows])
    lengths = torch.tensor([row.length for row in rows])
    ids = [torch.cat((row.prompt_ids, row.response.token_ids)) for row in rows]
    input_ids = pad_sequence(ids, batch_first=True)
    position = torch.arange(input_ids.shape[1])
    attention_mask = position < lengths[:, None]
    behave_logp = pad_sequence([row.response.behave_logp for row in rows], batch_first=True)
    return PaddedRows(
        index=torch.tensor([row.index for row in rows]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        is_response=attention_mask & (position >= prompt_lengths[:, None]),
        mask=torch.arange(behave_logp.shape[1]) < (lengths - prompt_lengths)[:, None],
        behave_logp=behave_logp,
        prox_logp=_padded([row.prox_logp for row in rows]),
        prox_share=None if rows[0].prox_share is None else torch.tensor([[row.prox_share] for row in rows]),
        advantages=_advantages(rows),
        loss_weight=torch.tensor([row.loss_weight for row in rows]),
        fresh=torch.tensor([row.fresh for row in rows]),
        age=torch.tensor([row.age for row in rows]),
        values=_padded([row.value for row in rows]),
        returns=_padded([row.returns for row in rows]),
        images=_images(rows),
    )


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


def split_rows(rows: Sequence[Row], token_budget: int) -> list[list[Row]]:
    """Rows by length into micro-batches of at most ``token_budget`` padded tokens.

    A row longer than the budget makes a micro-batch of its own. Sorting by length keeps the padding small; the
    loss does not depend on the split, because its denominator is the minibatch's.
    """
    parts: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):  # the first row of a part is its longest
        if parts and parts[-1][0].length * (len(parts[-1]) + 1) <= token_budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def proximal_logprobs(part: PaddedRows, logp: Tensor) -> Tensor:
    """(R, T) centre of the trust region: as recorded, or between behave and the policy, or the policy itself.

    Without anything recorded no step has been taken since the iteration began, and the policy is the centre.
    """
    if part.prox_share is not None:
        return torch.lerp(part.behave_logp, logp, part.prox_share)
    return logp if part.prox_logp is None else part.prox_logp


def token_columns(rows: Sequence[Row], logp: Sequence[Tensor]) -> list[Tensor]:
    """Flat (N,) columns over all response tokens: log-probs, proximal ones, behaviour ones, advantages, fresh (0 or 1).

    Args:
        rows: Of a minibatch.
        logp: (T,) log-probs of each row under the policy.
    """
    columns: list[list[Tensor]] = [[] for _ in range(5)]
    for row, present in zip(rows, logp, strict=True):
        behave = row.response.behave_logp
        prox = present if row.prox_logp is None else row.prox_logp
        if row.prox_share is not None:
            prox = torch.lerp(behave, present, row.prox_share)
        advantage = row.advantage.float().expand(len(present))
        values = (present, prox, behave, advantage, torch.full_like(present, row.fresh))
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return [torch.cat(column) if column else torch.empty(0) for column in columns]
