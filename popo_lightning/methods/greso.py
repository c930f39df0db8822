"""GRESO: skips, most of the time, problems whose groups repeatedly had no reward spread."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from popo_lightning.core.bounds import at_least, positive_share, within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.tasks.samplers import EpochSampler, PromptSampler

Kind = Literal["easy", "hard"]


@dataclass(eq=False)
class GRESO(PromptSampler):
    """Passes over the problems in a new order each time and skips one that was too easy or too hard z times in a row.

    Sources: arXiv 2506.02177 and github.com/Infini-AI-Lab/GRESO. The probability of skipping is

        1 - max(p^z, min_probability)

    with one p for easy problems (no spread, all correct) and one for hard ones. Each p moves after an iteration: down
    by ``step`` where the share of such groups among the sampled ones reached its target, otherwise up. The first pass
    skips nothing and therefore moves nothing. A skipped problem is not put back, and its z stays. GRESO then samples
    until the batch is full: use the composer DynamicSampling with an AdaptiveChunk. Stored: two numbers for each
    problem whose last group had no spread. Extra forward passes: none.

    Deviations: the spread itself is tested. The code tests mean rewards (at most 0.11 for hard, at least 0.98 for
    easy), so with more than 9 responses it calls a group with one success hard. A group without spread that is not easy
    is hard. The end of an iteration is noticed at the next iteration's first groups, after its first problems have been
    chosen. Every rank passes over its own share of the problems (index % ranks == rank) with its own p's.

    Args:
        p_easy: Initial p of easy problems; lower values skip more.
        p_hard: Initial p of hard problems; lower values skip more.
        target: Target share of groups without spread.
        easy_part: Fraction of the target for easy problems; hard ones get the rest.
        step: Change of a p per iteration.
        bounds: Minimum and maximum of p.
        min_probability: Minimum probability of asking a problem, however often it had no spread.
        reward_key: Reward component whose spread is tested; must be that of data.effective_key.
        easy_from: A group without spread is easy if its mean reward is at least this.
    """

    supports_async = False
    follows_reward = True
    state = ("order", "useless", "p", "seen", "version")

    p_easy: float = 0.5
    p_hard: float = 0.5
    target: float = 0.25
    easy_part: float = 1 / 3
    step: float = 0.01
    bounds: tuple[float, float] = (0.05, 0.95)
    min_probability: float = 0.01
    reward_key: str = "score"
    easy_from: float = 0.98

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not 0 < low <= high <= 1:
            raise SettingError(f"GRESO.bounds is {[low, high]}; give two rising probabilities, such as [0.05, 0.95]")
        within("GRESO.p_easy", self.p_easy, low, high, "0.5")
        within("GRESO.p_hard", self.p_hard, low, high, "0.5")
        within("GRESO.target", self.target, 0, 1, "0.25")
        within("GRESO.easy_part", self.easy_part, 0, 1, "0.33")
        at_least("GRESO.step", self.step, 0)
        positive_share("GRESO.min_probability", self.min_probability, "0.01")
        self._forget()

    def _forget(self) -> None:
        self.p: dict[Kind, float] = {"easy": self.p_easy, "hard": self.p_hard}
        self.order = EpochSampler()
        self.useless: dict[int, tuple[Kind, int]] = {}  # by problem index: kind of the last groups, and z
        self.seen = {"easy": 0, "hard": 0, "spread": 0}  # groups of the present iteration, from the second pass on
        self.version = -1

    def start(self, num_problems: int, seed: int, rank: int, world_size: int) -> None:
        """Begins without any knowledge."""
        super().start(num_problems, seed, rank, world_size)
        self._forget()
        self._share = self.own_share()
        self.order.start(len(self._share), seed, 0, 1)

    def draw(self, count: int) -> list[int]:
        """Returns the pass's next problem indices, without those skipped at random."""
        chosen: list[int] = []
        while len(chosen) < count:  # ends, because min_probability is above 0
            chance = random.Random(f"{self.seed}/{self.rank}/greso/{self.order.cursor}").random()
            (within_share,) = self.order.draw(1)
            index = self._share[within_share]
            if chance >= self.skip_probability(index):
                chosen.append(index)
        return chosen

    def skip_probability(self, index: int) -> float:
        """Returns a problem's probability of being skipped; 0 if it is new or its last group had a spread."""
        if index not in self.useless:
            return 0.0
        kind, times = self.useless[index]
        return 1 - max(self.p[kind] ** times, self.min_probability)

    def observe(self, indices: Sequence[int], groups: Sequence[Group]) -> None:
        """Updates each problem's z. A spread clears it, and a change between easy and hard restarts it at 1."""
        for index, group in zip(indices, groups, strict=True):
            if group.version > self.version:
                self._steer()
                self.version = group.version
            kind = self._kind(group)
            if self.order.cursor > len(self._share):
                self.seen[kind or "spread"] += 1
            if kind is None:
                self.useless.pop(index, None)
                continue
            was, times = self.useless.get(index, (kind, 0))
            self.useless[index] = (kind, times + 1 if was == kind else 1)

    def _kind(self, group: Group) -> Kind | None:
        if group.is_effective(self.reward_key):
            return None
        return "easy" if float(group.rewards(self.reward_key).mean()) >= self.easy_from else "hard"

    def _steer(self) -> None:
        """Updates each p from the groups of the iteration that has ended."""
        low, high = self.bounds
        targets: dict[Kind, float] = {"easy": self.target * self.easy_part, "hard": self.target * (1 - self.easy_part)}
        if groups := sum(self.seen.values()):
            for kind, target in targets.items():
                reached = self.seen[kind] / groups >= target
                self.p[kind] = max(self.p[kind] - self.step, low) if reached else min(self.p[kind] + self.step, high)
        self.seen = dict.fromkeys(self.seen, 0)
