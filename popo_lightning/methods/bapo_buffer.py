"""BAPO as in "Buffer Matters": fresh groups, hard problems asked again, and recent good groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from popo_lightning.core.bounds import at_least, one_of, within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import REWARD_TOLERANCE, Group
from popo_lightning.core.problems import Problem
from popo_lightning.replay.composer import Composer, Iteration

# Mean rewards between which the authors' code moves its thresholds.
CODE_REWARD_RANGE = (0.2, 0.8)


class BAPOBuffer(Composer):
    """A batch of three sources, without redundant sampling (arXiv 2602.20722; waunx/BAPO_ICLR).

    With mu the mean of a group's ``reward_key``, K its size and B the groups of an iteration, a batch is X1, X2 and X3:

        X1: the fresh groups with 1/K <= mu <= (K-1)/K
        X2: every m iterations, stored hard problems (mu <= c1) answered again, where now c1 < mu < 1; at most B - |X1|
        X3: min(|store|, B - |X1| - |X2|) stored groups with c2 <= mu <= c3, at most 3 versions old, evenly drawn

    No problem comes twice. Selection comes before insertion, and use removes nothing; hard problems leave first in,
    first out, or when they come up fresh and are hard no more. With ``adaptive``, c2 and c3 follow the mean mu r of the
    fresh groups: c = low + r (high - low) as in the paper's prose, so a better policy gets easier groups, or, as the
    authors' code has it, the other way round, with r first stretched from [0.2, 0.8] to [0, 1].

    Keeps problems with their mu, and the good groups of the last versions. Every m iterations up to ``ask_again``
    groups more are sampled; no forward pass is added. The paper's other parts: data.weight_sync_interval 2 (rollouts by
    weights that are renewed every other iteration) and TruncatedIS with cap 3. Let ``interval`` be a multiple of
    data.weight_sync_interval: only then does a problem meet the present weights when it is asked again.

    Deviations: the code keeps prox from the time of sampling for X3 and clips around the ratio it starts from; here
    prox is that of the iteration for all, and the weight does the rest. Its r is the mean over all that is stored.
    It keeps at most 8 good groups; here age alone bounds them unless ``good_capacity`` is set. What the paper's store
    holds beyond the thresholds is not known.

    Args:
        reward_key: Reward part whose mean is mu.
        hard: c1, greatest mu of a hard problem.
        good: c2 and c3, least and greatest mu of a replayed group: their low ends where they adapt.
        good_high: The high ends of c2 and c3.
        adaptive: off, or which way c2 and c3 follow the mean reward.
        interval: m, iterations between two times of asking hard problems again.
        ask_again: Most hard problems asked at a time, on each rank.
        promote: range is the rule above; improved takes every group whose mu is above the stored one, as in the code.
        hard_capacity: Hard problems kept, on each rank; null keeps as many as an iteration samples.
        good_capacity: Good groups kept, on each rank; null for no limit but age.
        max_age: Oldest replay in policy versions.
    """

    state = ("_hard", "_good")

    def __init__(
        self,
        reward_key: str = "acc",
        hard: float = 0.125,
        good: tuple[float, float] = (0.125, 0.25),
        good_high: tuple[float, float] = (0.5, 0.625),
        adaptive: Literal["off", "prose", "code"] = "off",
        interval: int = 2,
        ask_again: int = 32,
        promote: Literal["range", "improved"] = "range",
        hard_capacity: int | None = None,
        good_capacity: int | None = None,
        max_age: int = 3,
    ) -> None:
        for name, (low, high) in (("good", good), ("good_high", good_high)):
            if not 0 < low <= high < 1:
                raise SettingError(
                    f"BAPOBuffer.{name} is {[low, high]}; give the least and the greatest mean reward, between "
                    "0 and 1, such as [0.125, 0.25]."
                )
        self.reward_key = reward_key
        self.hard = within("BAPOBuffer.hard", hard, 0, 1, "0.125")
        self.good = good
        self.good_high = good_high
        self.adaptive = one_of("BAPOBuffer.adaptive", adaptive, ("off", "prose", "code"))
        self.interval = int(at_least("BAPOBuffer.interval", interval, 1, ", such as 2"))
        self.ask_again = int(at_least("BAPOBuffer.ask_again", ask_again, 0, ", such as 32"))
        self.promote = one_of("BAPOBuffer.promote", promote, ("range", "improved"))
        for name, value in (("hard_capacity", hard_capacity), ("good_capacity", good_capacity)):
            if value is not None:
                at_least(f"BAPOBuffer.{name}", value, 1, ", or null")
        self.hard_capacity = hard_capacity
        self.good_capacity = good_capacity
        self.max_age = int(at_least("BAPOBuffer.max_age", max_age, 1, ", such as 3"))
        self._hard: dict[str, tuple[Problem, float]] = {}  # by problem id, oldest first, with its mu
        self._good: deque[Group] = deque()

    def compose(self, iteration: Iteration) -> list[Group]:
        """X1, X2 and X3."""
        fresh = iteration.rollout()
        self._check_part(fresh)
        batch = [group for group in fresh if self._mixed(group)]
        batch += self._asked_again(batch, iteration)
        batch += self._replayed(batch, self._thresholds(fresh), iteration)
        self._insert(fresh, iteration)
        return batch

    def _mu(self, group: Group) -> float:
        return float(group.rewards(self.reward_key).double().mean())

    def _mixed(self, group: Group) -> bool:
        """Whether the group belongs to X1."""
        one = 1 / len(group.responses)
        return _between(one, self._mu(group), 1 - one)

    def _check_part(self, groups: Sequence[Group]) -> None:
        graded = [response.parts for group in groups for response in group.responses if response.failure is None]
        if graded and self.reward_key not in graded[0]:
            raise SettingError(
                f"BAPOBuffer.reward_key is '{self.reward_key}', which the task does not give; use one of "
                f"{', '.join(sorted(graded[0]))}."
            )

    def _asked_again(self, chosen: Sequence[Group], iteration: Iteration) -> list[Group]:
        """X2."""
        room = iteration.problems - len(chosen)
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
        """The c2 and c3 of this iteration."""
        if self.adaptive == "off":
            return self.good
        reward = sum(map(self._mu, fresh)) / len(fresh)
        if self.adaptive == "code":
            low, high = CODE_REWARD_RANGE
            reward = 1 - min(1.0, max(0.0, (reward - low) / (high - low)))
        c2, c3 = (low + reward * (high - low) for low, high in zip(self.good, self.good_high, strict=True))
        return c2, c3

    def _replayed(self, chosen: Sequence[Group], thresholds: tuple[float, float], iteration: Iteration) -> list[Group]:
        """X3."""
        self._forget(iteration.version)
        present = {group.problem.id for group in chosen}
        newest = {group.problem.id: group for group in self._good if group.problem.id not in present}
        usable = [group for group in newest.values() if _between(thresholds[0], self._mu(group), thresholds[1])]
        return iteration.random("good").sample(usable, min(len(usable), iteration.problems - len(chosen)))

    def _insert(self, fresh: Sequence[Group], iteration: Iteration) -> None:
        low, high = self.good
        if self.adaptive != "off":  # whatever a later iteration's thresholds may ask for
            low, high = min(low, self.good_high[0]), max(high, self.good_high[1])
        for group in fresh:
            mu = self._mu(group)
            self._hard.pop(group.problem.id, None)
            if mu <= self.hard + REWARD_TOLERANCE:
                self._hard[group.problem.id] = group.problem, mu
            if _between(low, mu, high):
                self._good.append(group)
        while len(self._hard) > (self.hard_capacity or iteration.problems):
            del self._hard[next(iter(self._hard))]
        while self.good_capacity is not None and len(self._good) > self.good_capacity:
            self._good.popleft()

    def _forget(self, version: int) -> None:
        self._good = deque(group for group in self._good if version - group.version <= self.max_age)


def _between(low: float, value: float, high: float) -> bool:
    """Whether low <= value <= high, but for rounding: a mean of rewards is not exactly k / K."""
    return low - REWARD_TOLERANCE <= value <= high + REWARD_TOLERANCE
