"""The slot of a verifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from popo_lightning.core.errors import SettingError


class Verifier(ABC):
    """Grades responses in a grading process: picklable, importable without torch, and never executes its input.

    An exception or a timeout gives reward 0 and is counted, so a verifier need not catch anything.
    """

    @abstractmethod
    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Reward components of one response.

        Args:
            answer: The problem's gold answer, in plain JSON types.
            text: What the policy wrote, with the beginning of the response that the prompt gave it, if any.

        Returns:
            "score", which trains; "acc", 1 for a right answer and else 0, which evaluates; "format", 1 where the
            answer could be found, and else 0; and other numbers to log. A bare number is the score.
        """

    def check_answer(self, answer: Any) -> None:  # noqa: B027  # most answers need no check
        """Raises ValueError, saying why in one sentence, for a gold answer that no response could match."""

    def columns(self) -> Sequence[str]:
        """Columns of a row that have to travel with the answer; a row without one gives no problem."""
        return ()

    def gold(self, answer: Any, columns: Mapping[str, Any]) -> Any:
        """What a response is graded by, in plain JSON types.

        Args:
            answer: The row's gold answer.
            columns: All that the row has, by our names and by its own, and the prompt as it is asked.
        """
        return answer


def check_format_reward(format_reward: float) -> None:
    """Raises SettingError where a wrong answer would be worth as much as a right one, or less than none."""
    number = isinstance(format_reward, int | float) and not isinstance(format_reward, bool)
    if not (number and 0.0 <= format_reward < 1.0):
        raise SettingError(
            f"data.task.verifier.format_reward is {format_reward!r} and a wrong answer in the right format must score "
            "less than 1; set it from 0 to below 1, such as 0.1"
        )
