"""The groups of one optimizer step, and their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from popo_lightning.core.groups import Group, Response


class Minibatch:
    """The groups of one optimizer step: one Lightning batch.

    This is intentionally not a dataclass: Lightning copies dataclasses while moving them to a device, and the proximal
    log-probs must be set on this object itself.

    Args:
        groups: Whole groups; may be empty if a composer dropped more than it kept.
        version: Policy version at the start of the iteration. The age of a group is ``version - group.version``.
        index: Position among the iteration's optimizer steps.
        part: Index of this minibatch's groups within the iteration, shared by all epochs. None uses `index`.

    Attributes:
        prox_logp: One (T,) tensor per row; None if not computed (yet).
        prox_is_start: Whether prox_logp is of the policy that the iteration began with, which sampled the fresh rows.
        prox_alpha: One number per row: the interpolation from behave to the policy, in log-probs, that prox is. None
            means that prox_logp holds.
        values: One (T,) tensor per row of a critic's values at the start of the iteration. None: computed before the
            step.
    """

    def __init__(self, groups: Sequence[Group], version: int, index: int, part: int | None = None) -> None:
        self.groups = list(groups)
        self.version = version
        self.index = index
        self.part = index if part is None else part
        self.prox_logp: list[Tensor] | None = None
        self.prox_is_start = False
        self.prox_alpha: list[float] | None = None
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
                        prox_alpha=None if self.prox_alpha is None else self.prox_alpha[index],
                        age=self.version - group.version_of(response),
                        loss_weight=group.loss_weight,
                        images=group.images,
                        value=None if values is None else values[index],
                        returns=None if returns is None else returns[index],
                    )
                )
        return rows


torch.serialization.add_safe_globals([Minibatch])  # for checkpoints, as groups are


def split_minibatches(
    groups: Sequence[Group], version: int, minibatches: int, ppo_epochs: int, random: Random
) -> list[Minibatch]:
    """Shuffles groups, never splitting one, and deals them out evenly; the number of minibatches is fixed.

    Args:
        groups: Those of one iteration.
        version: Policy version.
        minibatches: Parts, of which some are empty where there are fewer groups.
        ppo_epochs: Times the parts come, in the same order and with the same groups.
        random: Decides the order.
    """
    order = list(range(len(groups)))
    random.shuffle(order)
    dealt = [[groups[i] for i in order[part::minibatches]] for part in range(minibatches)]
    return [
        Minibatch(part, version, sweep * minibatches + place, place)
        for sweep in range(ppo_epochs)
        for place, part in enumerate(dealt)
    ]


@dataclass(frozen=True)
class Row:
    """One response with everything its loss needs; ``index`` is its position in the minibatch."""

    index: int
    prompt_ids: Tensor
    response: Response
    advantage: Tensor
    prox_logp: Tensor | None = None
    prox_alpha: float | None = None
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


def response_lengths(rows: Sequence[Row]) -> Tensor:
    """(R,) response tokens of each row."""
    return torch.tensor([len(row.response.token_ids) for row in rows], dtype=torch.long)


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
        if row.prox_alpha is not None:
            prox = torch.lerp(behave, present, row.prox_alpha)
        advantage = row.advantage.float().expand(len(present))
        values = (present, prox, behave, advantage, torch.full_like(present, row.fresh))
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return [torch.cat(column) if column else torch.empty(0) for column in columns]
