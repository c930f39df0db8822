"""Prompt samplers, which choose the problems of an iteration."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.core.ranks import other_number


class PromptSampler(KeepsState, ABC):
    """Slot: chooses problems by their index in the task's list.

    ``start`` is called once before anything else. A sampler draws from its own generator, never from global state.

    Attributes:
        state: Attributes that decide later draws; see :class:`KeepsState`.
        supports_async: Whether it makes sense with data.async_level 1: it does not read the policy version of groups it
            observes.
        follows_reward: Whether its `reward_key` must be the component that decides "effective".
    """

    supports_async: bool = True
    follows_reward: bool = False

    def start(self, num_problems: int, seed: int, rank: int, world_size: int) -> None:
        """Prepares the sampler for a number of problems, a seed, and this rank's share of the draws."""
        self.num_problems = num_problems
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def own_share(self) -> range:
        """Indices of the problems that this rank alone asks, for a rule that keeps what it learns of each.

        Raises:
            SettingError: There are fewer problems than ranks. All ranks raise it, or the others would wait.
        """
        if self.num_problems < self.world_size:
            raise SettingError(
                f"the task has {self.num_problems} problems for {self.world_size} ranks; use fewer trainer.devices"
            )
        return range(self.rank, self.num_problems, self.world_size)

    @abstractmethod
    def draw(self, count: int) -> list[int]:
        """Draws ``count`` problem indices for this rank."""

    def observe(self, indices: Sequence[int], groups: Sequence[Group]) -> None:  # uniform rules learn nothing
        """Observes the graded groups of the problems it drew, once for each draw, but never replayed groups."""

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """Redistributes the states in a checkpoint over another number of ranks; see :meth:`Composer.reshard`."""
        why = f"what data.sampler {type(self).__name__} has learned stays with its rank"
        raise other_number(len(states), ranks, why)


class EpochSampler(PromptSampler):
    """Asks every problem once per pass, in a new order each pass. Ranks take turns, so no two ask the same problem.

    The seed and the pass determine the order, so the cursor is the whole state.
    """

    state = ("cursor",)
    transient = ("_order", "_ordered")
    _ordered = 0, 0, -1  # the problems, seed and pass that _order is of
    cursor = 0  # draws made so far by all ranks together

    def draw(self, count: int) -> list[int]:
        """Returns this rank's next problem indices."""
        first = self.cursor + self.rank
        self.cursor += count * self.world_size
        return [self._index(first + i * self.world_size) for i in range(count)]

    def _index(self, draw: int) -> int:
        passed, within = divmod(draw, self.num_problems)
        if self._ordered != (self.num_problems, self.seed, passed):
            self._ordered = self.num_problems, self.seed, passed
            self._order = random.Random(f"{self.seed}/{passed}").sample(range(self.num_problems), self.num_problems)
        return self._order[within]

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """Gives every rank the same cursor, because it counts the draws of all ranks."""
        return [dict(states[0]) for _ in range(ranks)]
