"""What evaluations read of a run's data module, which has the engine, the graders and the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import lightning as L

from popo_lightning.core.groups import Group
from popo_lightning.core.problems import Problem
from popo_lightning.core.run_data import RunData, data_module
from popo_lightning.core.work import Work
from popo_lightning.engines.base import Sampling


class Background(Protocol):
    """The groups that are generated ahead."""

    def join(self) -> None:
        """Waits for the groups under way."""


class Generator(Protocol):
    """What generates and grades, and says how far it is."""

    work: Work


class EvaluatedRun(RunData, Protocol):
    """The part of RolloutDataModule that evaluations use.

    Attributes:
        iteration: Iterations begun.
        sampling: How training draws tokens.
        longest_response: Response limit that the engine must make room for, in tokens.
    """

    iteration: int
    sampling: Sampling
    longest_response: int

    @property
    def trainer(self) -> L.Trainer | None: ...  # noqa: D102

    @property
    def ahead(self) -> Background: ...  # noqa: D102

    @property
    def generator(self) -> Generator: ...  # noqa: D102

    @property
    def first_grading_failure(self) -> str | None: ...  # noqa: D102

    def benchmarks(self) -> Sequence[tuple[str, Sequence[Problem]]]:
        """The held-out problems by benchmark."""

    def leaves_at_once(self) -> AbstractContextManager[None]:
        """Lets a signal leave a block at once that changes nothing for good."""

    def sync(self) -> None:
        """Gives the engine the policy's newest weights, unless it has them already."""

    def sample(self, problems: Sequence[Problem], n: int, sampling: Sampling, seed: int) -> list[Group]:
        """Samples n graded responses for each problem, as one group each."""


def evaluated_run(trainer: L.Trainer) -> EvaluatedRun:
    """The data module of a trainer, as evaluations use it."""
    return cast(EvaluatedRun, data_module(trainer))
