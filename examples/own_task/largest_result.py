"""A task of your own: combine three numbers to as large a result as possible.

A prompt is `2,7,5>99:`, in the symbols of the embedded policy, which tries to reach 99. `7*5=35;35*2=70` is correct.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.toys.countdown import solutions, verify_steps
from popo_lightning.toys.held_out import hash_fraction


def verify_largest(answer: Any, text: str) -> dict[str, float]:
    """Returns the result of true steps over all numbers as a fraction of the largest. Runs in grading processes."""
    parts = verify_steps({"numbers": answer["numbers"], "target": answer["largest"]}, text)
    if parts["format"]:
        parts["score"] = int(text.strip().rsplit("=", 1)[1]) / answer["largest"]
    return parts


class LargestResult(Task):
    """Has every choice of numbers, split into train and held-out problems by a hash.

    Args:
        numbers: Number of numbers in a problem.
        largest_number: Numbers are from 1 to this.
        held_out_share: Fraction of the problems that is not trained on.
    """

    verify = staticmethod(verify_largest)

    def __init__(self, numbers: int = 3, largest_number: int = 12, held_out_share: float = 0.2) -> None:
        self.numbers = numbers
        self.largest_number = largest_number
        self.held_out_share = held_out_share

    def _problems(self, held_out: bool) -> list[Problem]:
        found = []
        for numbers in combinations_with_replacement(range(1, self.largest_number + 1), self.numbers):
            written = ",".join(map(str, numbers))
            if (hash_fraction(written) < self.held_out_share) == held_out:
                largest = max(steps[-1][3] for steps in solutions(numbers, "+-*"))
                found.append(Problem(written, f"{written}>99:", {"numbers": list(numbers), "largest": largest}))
        return found

    def train_problems(self) -> Sequence[Problem]:
        """Returns all problems that are not held out."""
        return self._problems(held_out=False)

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Returns one benchmark."""
        return {"largest_result": self._problems(held_out=True)}
