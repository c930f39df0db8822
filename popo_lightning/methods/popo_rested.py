"""Replays the groups unused for longest that still fit the present policy. A rule of this project."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from popo_lightning.core.bounds import at_least, within
from popo_lightning.core.groups import Group
from popo_lightning.methods.popo_gated import still_worth
from popo_lightning.replay.buffer import one_of_each_problem, redistribute
from popo_lightning.replay.composer import Composer, Iteration


class RestedReplay(Composer):
    """Replaces ineffective groups by the stored ones unused for longest that still pass a test.

    Source: none. POPO (2606.01281) takes the newest stored group, usually one trained on an iteration ago, whose
    gradient is still in the optimizer's momentum. A group that has rested is different data. How far the policy has
    moved from it limits its rest; the test measures this distance.

    Formula: stored groups wait in a queue. The groups at its front, as many as an iteration samples, are tested: with w
    = prox / behave of a group's N tokens, ESS = (sum w)^2 / (N sum w^2). A group with an ESS below ``min_ess`` leaves
    for good, so a fast policy leaves only young groups in the queue. The first of the others replace ineffective
    groups. Every group that is trained on goes to the back. The queue keeps ``rest_interval`` iterations' worth of
    groups and drops those of the oldest version first, so a group is trained on about every ``rest_interval``
    iterations.

    Stored: up to ``rest_interval`` x the groups an iteration samples. Extra passes: one forward pass over as many
    groups as an iteration samples (phase "rescore"), in iterations with a place to fill.

    Args:
        rest_interval: Iterations between two uses of a group that passes the test.
        min_ess: Minimum effective sample size per token, from 0 (no test) to 1 (only groups with all weights equal).
    """

    state = ("_queue",)

    def __init__(self, rest_interval: int = 10, min_ess: float = 0.9) -> None:
        self.rest_interval = at_least("data.composer.rest_interval", rest_interval, 1, ", such as 10")
        self.min_ess = within("data.composer.min_ess", min_ess, 0, 1, "0.9")
        self._queue: deque[Group] = deque()

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns effective fresh groups, then the longest rested ones that pass the test."""
        fresh = iteration.rollout()
        effective, ineffective = iteration.split(fresh)
        replayed = self._rested(len(ineffective), {group.problem.id for group in effective}, iteration)
        self._queue.extend(effective + replayed)
        self._forget_oldest(self.rest_interval * len(fresh))
        return effective + replayed

    def _rested(self, count: int, problems: set[str], iteration: Iteration) -> list[Group]:
        """Takes up to ``count`` groups out of the queue, and removes tested groups that fail."""
        tests = min(iteration.num_problems, len(self._queue)) if count else 0
        drawn = [self._queue.popleft() for _ in range(tests)]
        tested = list(filter(iteration.still_effective, drawn))  # the others rest on: charges may come back
        admitted = still_worth(tested, self.min_ess, iteration)
        replayed = one_of_each_problem(admitted, count, problems)
        gone = {id(group) for group in tested} - {id(group) for group in admitted} | {id(group) for group in replayed}
        self._queue.extendleft(reversed([group for group in drawn if id(group) not in gone]))
        return replayed

    def _forget_oldest(self, capacity: int) -> None:
        surplus = len(self._queue) - capacity
        if surplus > 0:
            versions = [group.version for group in self._queue]  # a deque is slow to index
            gone = set(sorted(range(len(versions)), key=versions.__getitem__)[:surplus])
            self._queue = deque(group for place, group in enumerate(self._queue) if place not in gone)

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """Redistributes all queues over the ranks."""
        return [{"_queue": queue} for queue in redistribute([state["_queue"] for state in states], ranks)]
