"""TRL's replay buffer: draws stored groups by the spread of their rewards."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from popo_lightning.core.bounds import at_least
from popo_lightning.core.groups import Group
from popo_lightning.objectives.advantages import group_normalized
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.priorities import draw


class ScorePriority(Composer):
    """Replaces ineffective groups by the best stored ones: TRL's experimental GRPO with a replay buffer.

    A heap of bounded size keeps the effective groups of the greatest score

        score = sum over responses of |A|  *  std of the group's rewards,   A = (R - mean) / (std + 1e-6),

    which is the sum of |R - mean|. Each ineffective group is replaced by one drawn in proportion to score: without
    replacement, or with it if there are fewer than wanted. Drawn groups stay. Age does not count, so a group can stay
    forever. TRL's loss has the ratio pi_policy / pi_behave, clipped around 1: use BehaveAligned with behavior weight
    NoCorrection. Extra rollouts and passes: none.

    Deviations: an iteration's own groups are stored after the draw unless ``insert_first`` is set. TRL stores them
    first, so they may occur twice. TRL breaks ties of scores by comparing dictionaries, which fails; here the older
    group leaves. While the store is empty, ineffective groups stay.

    Args:
        capacity: Maximum number of groups, per rank.
        insert_first: Store an iteration's effective groups before its draw, as TRL does.
    """

    state = ("_heap", "_seen")

    def __init__(self, capacity: int = 64, insert_first: bool = False) -> None:
        self.capacity = at_least("ScorePriority.capacity", capacity, 1, ", such as 64")
        self.insert_first = insert_first
        self._heap: list[tuple[float, int, Group]] = []  # the number breaks ties, because groups have no order
        self._seen = 0

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the effective fresh groups, then one drawn group for each ineffective one."""
        fresh = iteration.rollout()
        effective, ineffective = iteration.split(fresh)
        if self.insert_first:
            self._insert(effective, iteration.effective_key)
        replayed = self._draw(len(ineffective), iteration)
        if not self.insert_first:
            self._insert(effective, iteration.effective_key)
        return effective + (replayed or ineffective)

    def _insert(self, groups: Sequence[Group], reward_key: str) -> None:
        for group in groups:
            entry = (spread_score(group.combined(reward_key)), self._seen, group)
            self._seen += 1
            if len(self._heap) < self.capacity:
                heapq.heappush(self._heap, entry)
            elif entry[0] > self._heap[0][0]:
                heapq.heapreplace(self._heap, entry)

    def _draw(self, count: int, iteration: Iteration) -> list[Group]:
        stored = [entry for entry in self._heap if iteration.still_effective(entry[2])]
        if not stored:
            return []
        random, scores = iteration.random("score_priority"), [entry[0] for entry in stored]
        if count > len(scores):
            return [entry[2] for entry in random.choices(stored, scores, k=count)]
        return [stored[i][2] for i in draw([math.log(score) for score in scores], count, random)]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the heap, and keeps the best groups if the capacity is smaller now."""
        super().load_state_dict(state)
        if len(self._heap) > self.capacity:
            self._heap = sorted(self._heap, key=lambda entry: entry[:2])[-self.capacity :]  # a sorted list is a heap


def spread_score(rewards: Tensor) -> float:
    """Returns TRL's score of a group: sum |A| times the std of the rewards.

    Args:
        rewards: (K,) rewards.
    """
    return float(group_normalized(rewards[None]).abs().sum() * rewards.std(correction=1))
