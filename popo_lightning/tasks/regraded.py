"""A task with another task's problems and its own verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from popo_lightning.core.problems import Problem
from popo_lightning.core.task import BadRow, Task
from popo_lightning.tasks.reward_settings import FunctionAddress, WeightedFunction, try_functions, verifier_of
from popo_lightning.verifiers.base import Verifier


class Regraded(Task):
    """A task whose verifier is replaced, for example by a function.

    Functions may ask for the fields of ``Problem.info``, and of an answer that is a mapping, as they ask for columns.

    Args:
        task: Task whose problems are asked.
        verifier: Grades responses, as in DatasetTask.
    """

    def __init__(
        self, task: Task, verifier: Verifier | FunctionAddress | list[FunctionAddress | WeightedFunction]
    ) -> None:
        self.task = task
        self.verifier = self.verify = verifier_of(verifier)
        self.stop = task.stop

    def ask(self, question: str, images: Sequence[str] = (), gold: str | None = None) -> Problem:
        """Asks as the task does, but grades by this verifier."""
        problem = self.task.ask(question, images, gold)
        return problem if problem.answer is None else self._regraded(problem)

    def train_problems(self) -> Sequence[Problem]:
        """Returns the task's training problems, graded by this verifier."""
        return self._train_problems

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Returns the task's benchmarks, graded by this verifier."""
        return dict(self._benchmarks)

    def bad_rows(self) -> Sequence[BadRow]:
        """Returns the task's bad rows."""
        return self.task.bad_rows()

    @cached_property
    def _train_problems(self) -> list[Problem]:
        return self._graded(self.task.train_problems())

    @cached_property
    def _benchmarks(self) -> dict[str, list[Problem]]:
        return {name: self._graded(problems) for name, problems in self.task.benchmarks().items()}

    def _graded(self, problems: Sequence[Problem]) -> list[Problem]:
        found = list(map(self._regraded, problems))
        if found:
            try_functions(self.verifier, found[0])
        return found

    def _regraded(self, problem: Problem) -> Problem:
        return replace(problem, answer=self.verifier.gold(problem.answer, _columns(problem)))


def _columns(problem: Problem) -> dict[str, object]:
    parts = problem.answer if isinstance(problem.answer, dict) else {}
    return {**parts, **problem.info, "id": problem.id, "prompt": problem.question}
