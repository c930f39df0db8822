"""ARPO (arXiv 2505.16282): a failed group gets a stored success of its problem."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.response_store import ResponseStore


class ARPO(Composer):
    """ARPO: a group that failed altogether gets a stored success of its problem (2505.16282; dvlab-research/ARPO).

    Where the K successes of a fresh group have std < low_std and mean < low_mean, its first response gives way to one
    of the problem's stored successes, drawn at random. The group's advantages are then those of the mixed rewards. The
    source takes the success's old log-probs from the present policy, so that pi_prox / pi_behave is 1: use behave
    weight `NoCorrection` with `PPOClip`, whose prox is the present policy for every row. Stored: the newest `capacity`
    successes of each problem, with their behave log-probs (for the log alone). Extra passes and rollouts: none.

    Successes are stored after the injection, so an iteration's own cannot fill its failures.

    As in the source, failure is told by success alone, not by the reward that is trained on (there success + 0.5 *
    format): eight wrong responses of full format have failed. The std is the population's, and a response with a
    success above 0.1 is stored.

    A problem must come back: nothing is replayed in the first pass over the problems.

    Args:
        capacity: Successes kept of each problem.
        low_std: A group whose successes have a smaller std, and
        low_mean: a smaller mean, has failed.
        success_key: Reward part that tells a success, and whose std and mean these are.
        success_above: A response is a success where that part is more than this.
    """

    state = ("store",)
    transient = ("_injected",)

    def __init__(
        self,
        capacity: int = 8,
        low_std: float = 0.05,
        low_mean: float = 0.2,
        success_key: str = "acc",
        success_above: float = 0.1,
    ) -> None:
        if capacity < 1:
            raise SettingError(f"ARPO.capacity is {capacity}; keep at least 1 success of each problem")
        if not 0 < low_std < math.inf:
            raise SettingError(f"ARPO.low_std is {low_std}; no group has a smaller std, so use a number above 0")
        if not math.isfinite(low_mean):
            raise SettingError(f"ARPO.low_mean is {low_mean}; use a finite number, such as 0.2")
        self.low_std = low_std
        self.low_mean = low_mean
        self.success_key = success_key
        self.success_above = success_above
        self.store = ResponseStore(capacity)
        self._injected = 0  # in the last iteration

    def compose(self, iteration: Iteration) -> list[Group]:
        """The fresh groups, of which the failed ones have a stored success if there is one."""
        fresh = iteration.rollout()
        composed = [self._helped(group, iteration.random("ARPO", place)) for place, group in enumerate(fresh)]
        self._injected = sum(after is not before for after, before in zip(composed, fresh, strict=True))
        for group in fresh:
            self.store.insert(group, [response for response in group.responses if self._succeeded(response)])
        return composed

    def _helped(self, group: Group, random: Random) -> Group:
        successes = self.store.of(group.problem.id)
        if not successes or not self._failed(group):
            return group
        return replace(group, responses=[random.choice(successes), *group.responses[1:]])

    def _failed(self, group: Group) -> bool:
        successes = group.rewards(self.success_key)
        return bool(successes.std(correction=0) < self.low_std and successes.mean() < self.low_mean)

    def _succeeded(self, response: Response) -> bool:
        return response.failure is None and response.parts.get(self.success_key, 0.0) > self.success_above

    def passes_before_replay(self, group_size: int) -> int:
        """Times a problem must have been asked before any of its responses can be replayed."""
        return 1

    def report(self) -> dict[str, float]:
        """Responses injected in the last iteration, and the store's size."""
        return {"replay/injected_responses": float(self._injected)} | self.store.report()
