"""The sampling of one rollout iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.problems import Problem
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import Sampling
from popo_lightning.rollout.ahead import AsyncRollouts
from popo_lightning.rollout.generation import RolloutGenerator
from popo_lightning.rollout.report import RolloutReport
from popo_lightning.tasks.samplers import PromptSampler


class IterationRollouts:
    """Asks the prompt sampler, generates, grades and counts, for one iteration's composer.

    Args:
        problems: The training problems, by index.
        sampler: Chooses indices.
        maker: Generates and grades.
        sampling: How to draw tokens.
        random: A generator for one purpose of this iteration.
        needed_parts: Reward components that settings name, by setting.
        report: Counts what is sampled.
        ahead: Groups generated for this iteration while the previous one trained.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        sampler: PromptSampler,
        maker: RolloutGenerator,
        sampling: Sampling,
        random: Callable[..., Random],
        needed_parts: dict[str, str],
        report: RolloutReport,
        ahead: AsyncRollouts,
    ) -> None:
        self.problems = problems
        self.sampler = sampler
        self.maker = maker
        self.sampling = sampling
        self.random = random
        self.needed_parts = needed_parts
        self.report = report
        self.ahead = ahead
        self._calls = int(len(ahead) > 0)  # of the engine, for their seeds; generating ahead was the first

    def next_problems(self, count: int, n: int) -> list[Group]:
        """Groups of n responses to the sampler's next problems, of which it learns."""
        ready = self.ahead.take(count, n)
        places = [place for place, _ in ready]
        groups = [self.maker.numbered(group) for _, group in ready]
        self._count(groups)
        if further := count - len(ready):
            drawn = self.sampler.draw(further)
            places += drawn
            groups += self.given_problems([self.problems[place] for place in drawn], n)
        self.sampler.observe(places, groups)
        return groups

    def given_problems(
        self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None = None
    ) -> list[Group]:
        """Groups of n responses to these problems, each continuing a prefix if prefixes are given."""
        self._calls += 1
        groups = self.maker.make(problems, n, self.sampling, self._seed(self._calls), prefixes)
        self._count(groups)
        return groups

    def generate_ahead(self, count: int, n: int) -> None:
        """Starts on groups of n responses to the sampler's next problems, until so many wait for this iteration."""
        clock, missing = PhaseClock(), count - len(self.ahead)
        places = self.sampler.draw(missing) if missing > 0 else []
        problems = [self.problems[place] for place in places]
        make = partial(self.maker.apart(clock).make, problems, n, self.sampling, self._seed(1))
        self.ahead.begin(places, clock, make)

    def _seed(self, call: int) -> int:
        return self.random("rollout", call).getrandbits(62)

    def _count(self, groups: Sequence[Group]) -> None:
        self._check_parts(groups)
        self.report.sampled(groups)

    def _check_parts(self, groups: Sequence[Group]) -> None:
        graded = [response.parts for group in groups for response in group.responses if response.failure is None]
        for setting, part in self.needed_parts.items():
            if graded and part not in graded[0]:
                raise SettingError(
                    f"{setting} is '{part}', which the task does not give; use one of {', '.join(sorted(graded[0]))}"
                )
