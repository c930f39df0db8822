"""The slot a verifier fills."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Verifier(ABC):
    """Grades responses, in a grading process: picklable, importable without torch, and never executing what it reads.

    Whatever it raises, and whatever takes too long, is reward 0 and counted; a verifier need not catch anything.
    """

    @abstractmethod
    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Reward parts of one response.

        Args:
            answer: The problem's gold answer, in plain JSON types.
            text: What the policy wrote, with the beginning of the response that the prompt gave it, if any.

        Returns:
            "score", which trains; "acc", 1 for a right answer and else 0, which evaluates; "format", 1 where the
            answer could be found, and else 0; and whatever else should be logged.
        """

    def check_answer(self, answer: Any) -> None:  # noqa: B027  # most answers need no check
        """Raises ValueError, saying why in one sentence, for a gold answer that no response could match."""
