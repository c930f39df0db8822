"""The groups of one optimizer step, and their rows."""

from __future__ import annotations

import copy
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
        index_in_epoch: Position among the steps of its epoch; every epoch has the same groups there. None uses `index`.
        critic_groups: Groups of the same step that a critic alone learns from.

    Attributes:
        recorded: Quantities from the start of the iteration, one tensor () or (T,) per row, by the field of
            ObjectiveInputs that they fill. `prox_logp` has log-probs under prox; without it the policy's own forward
            pass gives them. `prox_alpha` says instead how far prox lies from behave to the policy, in log-probs.
            `values` are a critic's; without them they are computed before the step.
        extra: Further quantities of a rule's own, like `recorded`, by names that the rule chooses; its objective finds
            them in ObjectiveInputs' `extra`.
        prox_is_start: Whether prox is the policy that the iteration began with, which sampled the fresh rows.
        of_critic: Minibatch of the critic's groups; None if there are none.

    Setting any other attribute raises AttributeError: a row's quantity outside these two would reach no loss.
    """

    __slots__ = ("extra", "groups", "index", "index_in_epoch", "of_critic", "prox_is_start", "recorded", "version")

    def __init__(
        self,
        groups: Sequence[Group],
        version: int,
        index: int,
        index_in_epoch: int | None = None,
        critic_groups: Sequence[Group] = (),
    ) -> None:
        self.groups = list(groups)
        self.of_critic: Minibatch | None = None
        if critic_groups:
            self.of_critic = Minibatch(critic_groups, version, index, index_in_epoch)
        self.version = version
        self.index = index
        self.index_in_epoch = index if index_in_epoch is None else index_in_epoch
        self.recorded: dict[str, list[Tensor]] = {}
        self.extra: dict[str, list[Tensor]] = {}
        self.prox_is_start = False

    def as_it_is(self) -> Minibatch:
        """A copy that keeps its groups and tensors when later ones are recorded."""
        found = copy.copy(self)
        found.recorded, found.extra = dict(self.recorded), dict(self.extra)
        return found

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
        responses = [(group, response) for group in self.groups for response in group.responses]
        return [
            Row(
                index=index,
                prompt_ids=group.prompt_ids,
                response=response,
                age=self.version - group.version_of(response),
                loss_weight=group.loss_weight,
                images=group.images,
                tensors={name: column[index] for name, column in columns.items()},
            )
            for index, (group, response) in enumerate(responses)
        ]


torch.serialization.add_safe_globals([Minibatch])  # for checkpoints, like groups


def split_minibatches(
    groups: Sequence[Group],
    version: int,
    minibatches: int,
    ppo_epochs: int,
    random: Random,
    last: Collection[int] = (),
) -> list[Minibatch]:
    """Shuffles groups, never splitting one, and divides them evenly; the number of minibatches is fixed.

    Groups for a critic alone are divided separately, so that they do not change the other groups of a minibatch. They
    only go to minibatches that have other groups: without such a group, no step is taken.

    Args:
        groups: Groups of one iteration.
        version: Policy version.
        minibatches: Number of minibatches per epoch; some are empty if there are fewer groups.
        ppo_epochs: Number of epochs, which have the same minibatches in the same order.
        random: Random generator for the order.
        last: Ids of groups that come after all others, in the last minibatches.
    """
    trained = [group for group in groups if not group.critic_only]
    critic_groups = [group for group in groups if group.critic_only]
    order = list(range(len(trained)))
    random.shuffle(order)
    chunks = [order[first::minibatches] for first in range(minibatches)]
    if last:
        order.sort(key=lambda index: trained[index].id in last)
        ends = list(accumulate(map(len, chunks)))
        chunks = [order[end - len(chunk) : end] for chunk, end in zip(chunks, ends, strict=True)]
    filled = sum(map(bool, chunks)) or minibatches  # the filled ones come first
    return [
        Minibatch(
            [trained[index] for index in chunk],
            version,
            epoch * minibatches + number,
            number,
            critic_groups[number::filled] if number < filled else (),
        )
        for epoch in range(ppo_epochs)
        for number, chunk in enumerate(chunks)
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
