"""The groups of one optimizer step, and their rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

import torch
from torch import Tensor

from popo_lightning.core.groups import Group, Response

EXTRA = "extra."  # begins the names of what a rule adds, which ObjectiveInputs has no field for


class Minibatch:
    """The groups of one optimizer step: one Lightning batch.

    This is intentionally not a dataclass: Lightning copies dataclasses while moving them to a device, and the proximal
    log-probs must be set on this object itself.

    Args:
        groups: Whole groups; may be empty if a composer dropped more than it kept.
        version: Policy version at the start of the iteration. The age of a group is ``version - group.version``.
        index: Position among the iteration's optimizer steps.
        part: Index of this minibatch's groups within the iteration, shared by all epochs. None uses `index`.
        further: Groups of the same step that a critic alone learns from.

    Attributes:
        recorded: Quantities from the start of the iteration, one tensor () or (T,) per row, by the field of
            ObjectiveInputs that they fill. `prox_logp` has log-probs under prox; without it the policy's own forward
            pass gives them. `prox_alpha` says instead how far prox lies from behave to the policy, in log-probs.
            `values` are a critic's; without them they are computed before the step.
        extra: Further quantities of a rule's own, like `recorded`, by names that the rule chooses; its objective finds
            them in ObjectiveInputs' `extra`.
        prox_is_start: Whether prox is the policy that the iteration began with, which sampled the fresh rows.
        of_critic: Minibatch of the further groups; None if there are none.

    Setting any other attribute raises AttributeError: a row's quantity outside these two would reach no loss.
    """

    __slots__ = ("extra", "groups", "index", "of_critic", "part", "prox_is_start", "recorded", "version")

    def __init__(
        self,
        groups: Sequence[Group],
        version: int,
        index: int,
        part: int | None = None,
        further: Sequence[Group] = (),
    ) -> None:
        self.groups = list(groups)
        self.of_critic: Minibatch | None = Minibatch(further, version, index, part) if further else None
        self.version = version
        self.index = index
        self.part = index if part is None else part
        self.recorded: dict[str, list[Tensor]] = {}
        self.extra: dict[str, list[Tensor]] = {}
        self.prox_is_start = False

    @property
    def fresh(self) -> list[bool]:
        """Per group, whether the present policy version sampled it."""
        return [group.version == self.version for group in self.groups]

    @property
    def responses(self) -> list[Response]:
        """All responses, group after group."""
        return [response for group in self.groups for response in group.responses]

    @property
    def tokens(self) -> int:
        """Response tokens: this rank's share of the loss denominator."""
        return sum(group.tokens for group in self.groups)

    @property
    def critic_tokens(self) -> int:
        """Response tokens that a critic learns from."""
        return self.tokens + (0 if self.of_critic is None else self.of_critic.tokens)

    def charged(self, advantages: Sequence[Tensor]) -> list[Tensor]:
        """Subtracts what limits charge from advantages: each response's penalty minus the mean of its group.

        Args:
            advantages: One tensor per row, () or (T,), in the order of :attr:`responses`.
        """
        if not any(response.penalty for response in self.responses):
            return list(advantages)
        charges: list[Tensor] = []
        for group in self.groups:
            penalties = group.penalties()
            charges += (penalties - penalties.mean()).unbind()
        return [advantage - charge for advantage, charge in zip(advantages, charges, strict=True)]

    def rows(self, **computed: Sequence[Tensor]) -> list[Row]:
        """One row per response, in the order of :attr:`responses`.

        Args:
            computed: One tensor per row, () or (T,), by the field of ObjectiveInputs that it fills, such as
                `advantages`. They are added to those of :attr:`recorded`.
        """
        columns = self.recorded | computed | {f"{EXTRA}{name}": found for name, found in self.extra.items()}
        rows: list[Row] = []
        for group in self.groups:
            for response in group.responses:
                index = len(rows)
                rows.append(
                    Row(
                        index=index,
                        prompt_ids=group.prompt_ids,
                        response=response,
                        age=self.version - group.version_of(response),
                        loss_weight=group.loss_weight,
                        images=group.images,
                        tensors={name: column[index] for name, column in columns.items()},
                    )
                )
        return rows


torch.serialization.add_safe_globals([Minibatch])  # for checkpoints, like groups


def split_minibatches(
    groups: Sequence[Group],
    version: int,
    minibatches: int,
    ppo_epochs: int,
    random: Random,
    last: Collection[int] = (),
) -> list[Minibatch]:
    """Shuffles groups, never splitting one, and deals them out evenly; the number of minibatches is fixed.

    Groups for a critic alone are dealt out separately, so that they do not change the other parts. They only go to
    parts that have other groups: without such a group, no step is taken.

    Args:
        groups: Groups of one iteration.
        version: Policy version.
        minibatches: Number of parts; some are empty if there are fewer groups.
        ppo_epochs: Number of times that the parts are repeated, in the same order and with the same groups.
        random: Random generator for the order.
        last: Ids of groups that come after all others, in the last parts.
    """
    trained = [group for group in groups if not group.critic_only]
    further = [group for group in groups if group.critic_only]
    order = list(range(len(trained)))
    random.shuffle(order)
    parts = [order[part::minibatches] for part in range(minibatches)]
    if last:
        order.sort(key=lambda place: trained[place].id in last)
        ends = list(accumulate(map(len, parts)))
        parts = [order[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]
    filled = sum(map(bool, parts)) or minibatches  # the filled parts come first
    return [
        Minibatch(
            [trained[each] for each in part],
            version,
            sweep * minibatches + place,
            place,
            further[place::filled] if place < filled else (),
        )
        for sweep in range(ppo_epochs)
        for place, part in enumerate(parts)
    ]


@dataclass(frozen=True)
class Row:
    """One response with everything its loss needs.

    Args:
        index: Position in the minibatch.
        prompt_ids: (P,) int64 prompt tokens.
        response: The response.
        age: Policy versions since the response was sampled; 0 for a fresh row.
        loss_weight: Multiplies the row's loss.
        images: The vision tower's inputs for the prompt's images; empty for text.
        tensors: Tensors, () or (T,), by the field of ObjectiveInputs that they fill; names of `extra` begin with EXTRA.
    """

    index: int
    prompt_ids: Tensor
    response: Response
    age: int = 0
    loss_weight: float = 1.0
    images: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def fresh(self) -> bool:
        """Whether the present policy version sampled the response."""
        return self.age == 0


def response_lengths(rows: Sequence[Row]) -> Tensor:
    """(R,) number of response tokens of each row."""
    return torch.tensor([len(row.response.token_ids) for row in rows], dtype=torch.long)
