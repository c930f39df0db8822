"""The slot of a task."""

# Without postponed annotations, whose names jsonargparse would look up in the module of a dataclass derived from Task.

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from popo_lightning.core.problems import Problem
from popo_lightning.core.user_question import asked_like

Verify = Callable[[Any, str], dict[str, float]]
"""(gold answer, response text) -> reward components: "score" trains, "acc" evaluates, "format" and others are logged.

A bare number is the score."""


@dataclass(frozen=True)
class BadRow:
    """A row of a data file that gives no problem.

    Args:
        source: File or hub data set.
        row: Number of the row in the source, from 1.
        reason: The fault and the remedy; the text follows "row 7 of FILE".
    """

    source: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} of {self.source} {self.reason}"


class Task(ABC):
    """Problems to train on, problems to evaluate on, and the function that grades a response."""

    verify: Verify
    """A top-level function or picklable object, importable without torch: it runs in the grading processes."""

    stop: Sequence[str] = ()
    """Strings that end a response if data.stop is null: they would begin the next question of a plain prompt."""

    @abstractmethod
    def train_problems(self) -> Sequence[Problem]:
        """Problems to sample from, in a fixed order."""

    @abstractmethod
    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Held-out problems by benchmark name."""

    def ask(self, question: str, images: Sequence[str] = (), gold: str | None = None) -> Problem:
        """Makes a user's question one of the task's problems, for `popo sample`.

        Args:
            question: Text of the question, without what the task puts around it.
            images: Paths of images.
            gold: Right answer, as text or JSON; None leaves it open.

        Raises:
            SettingError: The task cannot ask the question, or takes another kind of answer.
        """
        return asked_like(self.train_problems()[0], question, images, gold)

    def bad_rows(self) -> Sequence[BadRow]:
        """Rows of the data read so far that were left out."""
        return ()
