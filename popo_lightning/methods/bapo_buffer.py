"""BAPO as in "Buffer Matters": fresh groups, hard problems asked again, and recent good groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from popo_lightning.core.bounds import at_least, one_of, within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import REWARD_TOLERANCE, Group
from popo_lightning.core.problems import Problem
from popo_lightning.replay.composer import Composer, Iteration

# Range of mean rewards over which the authors' code moves its thresholds.
CODE_REWARD_RANGE = (0.2, 0.8)


@dataclass(eq=False)
class BAPOBuffer(Composer):
    """Builds a batch from three sources, without redundant sampling (arXiv 2602.20722; waunx/BAPO_ICLR).

    With mu the mean of a group's ``success_key``, K its size and B an iteration's groups, a batch is X1, X2 and X3:

        X1: the fresh groups with 1/K <= mu <= (K-1)/K
        X2: every m iterations, stored hard problems (mu <= c1) answered again, where now c1 < mu < 1; at most B - |X1|
        X3: min(|store|, B - |X1| - |X2|) stored groups with c2 <= mu <= c3, at most 3 versions old, drawn uniformly

    No problem occurs twice. Selection precedes insertion, and use removes nothing. Hard problems leave first in, first
    out, or when a fresh group shows that they are no longer hard. With ``adaptive``, c2 and c3 follow the mean mu r of
    the fresh groups. The paper's prose has c = low + r (high - low), so a better policy gets easier groups. The
    authors' code has the reverse, with r first stretched from [0.2, 0.8] to [0, 1].

    Stored: problems with their mu, and the good groups of the last versions. Extra rollouts: up to ``ask_again`` groups
    every m iterations. Extra passes: none. The paper's other parts are data.weight_sync_interval 2 (weights are renewed
    every other iteration) and TruncatedIS with cap 3. Make ``interval`` a multiple of data.weight_sync_interval: only
    then does a problem meet the present weights when it is asked again.

    Deviations: for X3 the code keeps prox from the time of sampling and clips around the ratio it starts from; here
    prox is the iteration's for all groups, and the weight corrects the rest. The code's r is the mean over all stored
    groups. The code keeps at most 8 good groups; here age alone bounds them unless ``good_capacity`` is set. It is not
    known what the paper's store holds beyond the thresholds.

    Args:
        success_key: Reward component whose mean is mu.
        hard: c1, maximum mu of a hard problem.
        good: c2 and c3, minimum and maximum mu of a replayed group. With adaptive, the low ends of c2 and c3.
        good_high: High ends of c2 and c3.
        adaptive: off keeps c2 and c3 fixed; prose and code follow the mean reward as above.
        interval: m, iterations between re-asking hard problems.
        ask_again: Maximum number of hard problems re-asked at a time, per rank.
        promote: range is the rule above; improved takes every group whose mu is above the stored one, as in the code.
        hard_capacity: Maximum number of hard problems kept, per rank; null keeps as many as an iteration samples.
        good_capacity: Maximum number of good groups kept, per rank; null bounds them by age only.
        max_age: Maximum age of a replayed group in policy versions.
    """

    state = ("_hard", "_good")

    success_key: str = "acc"
    hard: float = 0.125
    good: tuple[float, float] = (0.125, 0.25)
    good_high: tuple[float, float] = (0.5, 0.625)
    adaptive: Literal["off", "prose", "code"] = "off"
    interval: int = 2
    ask_again: int = 32
    promote: Literal["range", "improved"] = "range"
    hard_capacity: int | None = None
    good_capacity: int | None = None
    max_age: int = 3

    def __post_init__(self) -> None:
        for name, (low, high) in (("good", self.good), ("good_high", self.good_high)):
            if not 0 < low <= high < 1:
                raise SettingError(
                    f"BAPOBuffer.{name} is {[low, high]}; give the least and the greatest mean reward, between "
                    "0 and 1, such as [0.125, 0.25]."
                )
        within("BAPOBuffer.hard", self.hard, 0, 1, "0.125")
        one_of("BAPOBuffer.adaptive", self.adaptive, ("off", "prose", "code"))
        at_least("BAPOBuffer.interval", self.interval, 1, ", such as 2")
        at_least("BAPOBuffer.ask_again", self.ask_again, 0, ", such as 32")
        one_of("BAPOBuffer.promote", self.promote, ("range", "improved"))
        for name, value in (("hard_capacity", self.hard_capacity), ("good_capacity", self.good_capacity)):
            if value is not None:
                at_least(f"BAPOBuffer.{name}", value, 1, ", or null")
        at_least("BAPOBuffer.max_age", self.max_age, 1, ", such as 3")
        self._hard: dict[str, tuple[Problem, float]] = {}  # by problem id, oldest first, with its mu
        self._good: deque[Group] = deque()

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the groups of X1, X2 and X3."""
        fresh = iteration.rollout()
        batch = [group for group in fresh if self._mixed(group)]
        batch += self._asked_again(batch, iteration)
        batch += self._replayed(batch, self._thresholds(fresh), iteration)
        self._insert(fresh, iteration)
        return batch

    def _mu(self, group: Group) -> float:
        return float(group.rewards(self.success_key).double().mean())

    def _mixed(self, group: Group) -> bool:
        """Returns whether the group belongs to X1."""
        one = 1 / len(group.responses)
        return _between(one, self._mu(group), 1 - one)

    def _asked_again(self, chosen: Sequence[Group], iteration: Iteration) -> list[Group]:
        """Samples X2."""
        room = iteration.num_problems - len(chosen)
        if iteration.version % self.interval or not room:
            return []
        present = {group.problem.id for group in chosen}
        random = iteration.random("hard")
        asked = [problem for problem, _ in self._hard.values() if problem.id not in present]
        asked = random.sample(asked, min(self.ask_again, len(asked)))
        found = [group for group in iteration.sample(asked, iteration.group_size) if self._promoted(group)]
        return random.sample(found, room) if len(found) > room else found

    def _promoted(self, group: Group) -> bool:
        mu = self._mu(group)
        if self.promote == "improved":
            return mu > self._hard[group.problem.id][1] + REWARD_TOLERANCE
        return self.hard + REWARD_TOLERANCE < mu < 1 - REWARD_TOLERANCE

    def _thresholds(self, fresh: Sequence[Group]) -> tuple[float, float]:
        """Returns this iteration's c2 and c3."""
        if self.adaptive == "off":
            return self.good
        reward = sum(map(self._mu, fresh)) / len(fresh)
        if self.adaptive == "code":
            low, high = CODE_REWARD_RANGE
            reward = 1 - min(1.0, max(0.0, (reward - low) / (high - low)))
        c2, c3 = (low + reward * (high - low) for low, high in zip(self.good, self.good_high, strict=True))
        return c2, c3

    def _replayed(self, chosen: Sequence[Group], thresholds: tuple[float, float], iteration: Iteration) -> list[Group]:
        """Draws X3."""
        self._good = deque(group for group in self._good if iteration.version - group.version <= self.max_age)
        present = {group.problem.id for group in chosen}
        newest = {group.problem.id: group for group in self._good if group.problem.id not in present}
        usable = [group for group in newest.values() if _between(thresholds[0], self._mu(group), thresholds[1])]
        return iteration.random("good").sample(usable, min(len(usable), iteration.num_problems - len(chosen)))

    def _insert(self, fresh: Sequence[Group], iteration: Iteration) -> None:
        low, high = self.good
        if self.adaptive != "off":  # a later iteration's thresholds may need any group
            low, high = min(low, self.good_high[0]), max(high, self.good_high[1])
        for group in fresh:
            mu = self._mu(group)
            self._hard.pop(group.problem.id, None)
            if mu <= self.hard + REWARD_TOLERANCE:
                self._hard[group.problem.id] = group.problem, mu
            if _between(low, mu, high):
                self._good.append(group)
        while len(self._hard) > (self.hard_capacity or iteration.num_problems):
            del self._hard[next(iter(self._hard))]
        while self.good_capacity is not None and len(self._good) > self.good_capacity:
            self._good.popleft()


def _between(low: float, value: float, high: float) -> bool:
    """Returns whether low <= value <= high, but for rounding: a mean of rewards is not exactly k / K."""
    return low - REWARD_TOLERANCE <= value <= high + REWARD_TOLERANCE
