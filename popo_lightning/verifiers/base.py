"""The slot of a verifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from popo_lightning.core.errors import SettingError


class Verifier(ABC):
    """Grades responses in a grading process. Must be picklable and importable without torch, and never execute input.

    An exception or a timeout gives reward 0 and is counted, so a verifier need not catch anything.
    """

    @abstractmethod
    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Returns the reward components of one response.

        Args:
            answer: The problem's gold answer, in plain JSON types.
            text: The policy's response, including the beginning that the prompt gave it, if any.

        Returns:
            "score", which is trained on; "acc", 1 for a correct answer, else 0, which evaluations use; "format", 1 if
            an answer was found, else 0; and other numbers to log. A bare number is the score.
        """

    def check_answer(self, answer: Any) -> None:  # noqa: B027  # most answers need no check
        """Raises ValueError with a one-sentence reason for a gold answer that no response could match."""

    def columns(self) -> Sequence[str]:
        """Returns the columns of a row that it needs besides the answer. A row that lacks one gives no problem."""
        return ()

    def gold(self, answer: Any, columns: Mapping[str, Any]) -> Any:
        """Returns the answer passed to `__call__`, in plain JSON types.

        Args:
            answer: The row's gold answer.
            columns: All columns of the row, by field names and by their own names, and the prompt as asked.
        """
        return answer


def check_format_reward(format_reward: float) -> None:
    """Raises SettingError if a wrong answer would score as much as a correct one, or less than 0."""
    number = isinstance(format_reward, int | float) and not isinstance(format_reward, bool)
    if not (number and 0.0 <= format_reward < 1.0):
        raise SettingError(
            f"data.task.verifier.format_reward is {format_reward!r} and a wrong answer in the right format must score "
            "less than 1; set it from 0 to below 1, such as 0.1"
        )
