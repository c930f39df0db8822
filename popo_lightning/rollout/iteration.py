"""The sampling of one rollout iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.core.ranks import all_reduce
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import Sampling
from popo_lightning.replay.composer import Iteration
from popo_lightning.rollout.ahead import AsyncRollouts
from popo_lightning.rollout.generation import RolloutGenerator
from popo_lightning.rollout.report import RolloutReport
from popo_lightning.tasks.samplers import PromptSampler


@dataclass
class IterationRollouts(Iteration):
    """Asks the prompt sampler, generates, grades and counts, for one iteration's composer.

    Args:
        version: Present policy version.
        effective_key: Reward component whose spread makes a group effective.
        problems: Problems per iteration on this rank.
        group_size: Responses per problem.
        seed: Seed of the run.
        train: Training problems, by index.
        sampler: Chooses indices.
        maker: Generates and grades.
        sampling: How to draw tokens.
        policy: The PolicyModule that scores responses.
        report: Counts what is sampled.
        ahead: Groups generated for this iteration while the previous one trained.
    """

    version: int
    effective_key: str
    problems: int
    group_size: int
    seed: int
    train: Sequence[Problem]
    sampler: PromptSampler
    maker: RolloutGenerator
    sampling: Sampling
    policy: Any
    report: RolloutReport
    ahead: AsyncRollouts

    def __post_init__(self) -> None:
        self._calls = int(len(self.ahead) > 0)  # of the engine, for their seeds; generating ahead was the first

    def rollout(self, count: int | None = None, n: int | None = None) -> list[Group]:
        """Groups of responses to the sampler's next problems, of which it learns."""
        count, n = self.problems if count is None else count, self.group_size if n is None else n
        ready = self.ahead.take(count, n)
        places = [place for place, _ in ready]
        groups = [self.maker.numbered(group) for _, group in ready]
        self._count(groups)
        if further := count - len(ready):
            drawn = self.sampler.draw(further)
            places += drawn
            groups += self._generated([self.train[place] for place in drawn], n)
        self.sampler.observe(places, groups)
        return groups

    def sample(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None = None) -> list[Group]:
        """Groups of n responses to these problems, each continuing a prefix if prefixes are given."""
        return self._generated(problems, n, prefixes) if problems else []

    def _generated(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None = None) -> list[Group]:
        self._calls += 1
        groups = self.maker.make(problems, n, self.sampling, self._seed(self._calls), prefixes)
        self._count(groups)
        return groups

    def logprobs(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """(T,) log-probs of each response under the present policy."""
        if not groups:
            return []
        self._some_rank_asks(True)
        found = iter(self._scored(groups))
        return [[next(found) for _ in group.responses] for group in groups]

    def end(self) -> None:
        """Joins in the passes that other ranks ask for, until none does. Every rank calls it once it has composed."""
        while self._some_rank_asks(False):
            self._scored([])

    def _some_rank_asks(self, asks: bool) -> bool:
        """Split weights are gathered from all ranks for each pass, so all of them meet before it. A collective then."""
        return self.policy.sharded and bool(all_reduce(self.policy.trainer, asks, "max"))

    def _scored(self, groups: Sequence[Group]) -> list[Tensor]:
        with self.maker.clock.measure("rank"):
            found: list[Tensor] = self.policy.logprobs(Minibatch(groups, self.version, 0))
        return found

    def random(self, *purpose: object) -> Random:
        """A generator for one purpose, from (seed, rank, iteration, purpose), never from global state."""
        return Random("/".join(map(str, (self.seed, self.maker.rank, self.version, *purpose))))

    def generate_ahead(self) -> None:
        """Starts on groups of responses to the sampler's next problems, until an iteration's number waits for it."""
        clock, missing = PhaseClock(), self.problems - len(self.ahead)
        places = self.sampler.draw(missing) if missing > 0 else []
        problems = [self.train[place] for place in places]
        make = partial(self.maker.apart(clock).make, problems, self.group_size, self.sampling, self._seed(1))
        self.ahead.begin(places, clock, make)

    def _seed(self, call: int) -> int:
        return self.random("rollout", call).getrandbits(62)

    def _count(self, groups: Sequence[Group]) -> None:
        self._check_parts(groups)
        self.report.sampled(groups)

    def _check_parts(self, groups: Sequence[Group]) -> None:
        graded = [response.parts for group in groups for response in group.responses if response.failure is None]
        for setting, part in self._needed_parts():
            if graded and part not in graded[0]:
                raise SettingError(
                    f"{setting} is '{part}', which the task does not give; use one of {', '.join(sorted(graded[0]))}"
                )

    def _needed_parts(self) -> list[tuple[str, str]]:
        """Reward parts that settings name, by setting."""
        return [("data.effective_key", self.effective_key), ("model.reward_key", self.policy.reward_key)]
