"""A task with hints in randomly chosen prompts: the instrument of `popo estimate --instrument`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from popo_lightning.core.bounds import between
from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import BadRow, Task
from popo_lightning.core.user_question import with_question


@dataclass(eq=False)
class Hinted(Task):
    """A task with a hint before the question of some held-out problems. A coin decides for each problem.

    ``Problem.info`` records the hint as 1 or 0 under ``name``; evaluations write it if evaluation.breakdown names it.
    The coin depends only on the seed and the problem's id, so every evaluation asks the same.

    Args:
        task: Task whose problems are asked.
        hint: Text before the question, with the space or newline between them.
        share: Fraction of the problems that get the hint.
        name: Name of the hint's entry in ``Problem.info``.
        seed: Seed of the coin.
        in_training: Also give training problems the hint by the same coin.
    """

    task: Task
    hint: str
    share: float = 0.5
    name: str = "hint"
    seed: int = 0
    in_training: bool = False

    def __post_init__(self) -> None:
        if not self.hint.strip():
            raise SettingError("data.task.hint is empty; give the text that some prompts get")
        between("data.task.share", self.share, 0, 1, ", so that both kinds are asked")
        self.verify = self.task.verify
        self.stop = self.task.stop

    def train_problems(self) -> Sequence[Problem]:
        """Returns the task's training problems, some of them hinted if `in_training` is set."""
        return self._train_problems

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Returns the task's benchmarks, with some problems hinted."""
        return dict(self._benchmarks)

    def ask(self, question: str, images: Sequence[str] = (), gold: str | None = None) -> Problem:
        """Asks as the task does, without a hint."""
        return self.task.ask(question, images, gold)

    def bad_rows(self) -> Sequence[BadRow]:
        """Returns the task's bad rows."""
        return self.task.bad_rows()

    @cached_property
    def _train_problems(self) -> Sequence[Problem]:
        problems = self.task.train_problems()
        return [self._with_coin(problem) for problem in problems] if self.in_training else problems

    @cached_property
    def _benchmarks(self) -> dict[str, list[Problem]]:
        return {name: list(map(self._with_coin, problems)) for name, problems in self.task.benchmarks().items()}

    def _with_coin(self, problem: Problem) -> Problem:
        if self.name in problem.info:
            raise SettingError(
                f"data.task.name is '{self.name}', which the problems' info has already; use another name for the hint"
            )
        hinted = random.Random(f"hint/{self.seed}/{problem.id}").random() < self.share
        prompt = with_question(problem.prompt, self.hint + problem.question) if hinted else problem.prompt
        return replace(problem, prompt=prompt, info=problem.info | {self.name: int(hinted)})
