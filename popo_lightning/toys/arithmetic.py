"""Small sums, asked in chat messages: a task that a pretrained model of 135M parameters can learn.

The messages show one worked problem, ``2 + 3`` and ``2 + 3 = 5``, and then ask another. So small a model follows an
example but ignores an instruction. Problems are enumerated, not downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.toys.held_out import check_split, hash_fraction

MAX_RESPONSE_CHARACTERS = 2000
RESULT = re.compile(r"=[ ]{0,3}(-?[0-9]{1,9})(?![0-9]|[.,][0-9]|[ ]{0,3}[-+*/×÷])")

KINDS = ("a+b", "a-b", "a*b", "a+b+c", "a+b-c")


def verify_result(answer: Any, text: str) -> dict[str, float]:
    """Grades a written equation against the correct whole number.

    The number after the last equals sign counts. score and acc are 1 if it is correct, else 0. format is 1 if there is
    such a number. Input is bounded to 2,000 characters and nine digits.
    """
    found = RESULT.findall(text) if len(text) <= MAX_RESPONSE_CHARACTERS else []
    right = float(bool(found) and int(found[-1]) == answer)
    return {"score": right, "acc": right, "format": float(bool(found))}


@dataclass(eq=False)
class Arithmetic(Task):
    """Sums, differences and products of small numbers, split into train and held-out by a hash of the problem.

    A problem is held out in either order: a problem with swapped terms has the same hash.

    Args:
        kinds: Kinds of problems: a+b, a-b, a*b, a+b+c and a+b-c. The kind is the level in breakdowns.
        smallest_number: Smallest number in a problem.
        largest_number: Largest number in a problem. Problems with a negative result are never asked.
        problems_per_kind: Maximum number of training problems per kind, chosen by hash.
        held_out_per_kind: Number of held-out problems per kind.
        held_out_share: Fraction of all problems kept out of training.
        system: System message; null for none. Without one, some chat templates insert a longer default message; an
            empty message prevents that. Some templates refuse system messages.
    """

    kinds: Sequence[str] = ("a+b", "a-b")
    smallest_number: int = 2
    largest_number: int = 20
    problems_per_kind: int = 1000
    held_out_per_kind: int = 50
    held_out_share: float = 0.33
    system: str | None = None

    verify = staticmethod(verify_result)

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise SettingError(f"data.task.kinds is {list(self.kinds)}; name some of {', '.join(KINDS)}, each once")
        if not 0 <= self.smallest_number <= self.largest_number <= 99:
            raise SettingError(
                f"data.task.smallest_number is {self.smallest_number} and data.task.largest_number "
                f"{self.largest_number}; use 0 to 99, the smaller first"
            )
        check_split(self, "problems_per_kind", "held_out_per_kind")

    @cached_property
    def _split(self) -> tuple[list[Problem], list[Problem]]:
        train: list[Problem] = []
        held_out: list[Problem] = []
        for kind in self.kinds:
            mine: tuple[list[Problem], list[Problem]] = [], []
            for numbers, result in enumerated(kind, range(self.smallest_number, self.largest_number + 1)):
                is_held_out = hash_fraction(mirrored(kind, numbers)) < self.held_out_share
                text = written(kind, numbers)
                mine[is_held_out].append(Problem(text, messages(text, self.system), result, {"level": kind}))
            self._check_enough(kind, len(mine[0]), len(mine[1]))
            train += sorted(mine[0], key=_hash)[: self.problems_per_kind]
            held_out += sorted(mine[1], key=_hash)[: self.held_out_per_kind]
        return sorted(train, key=_hash), sorted(held_out, key=_hash)

    def _check_enough(self, kind: str, train: int, held_out: int) -> None:
        if not train or held_out < self.held_out_per_kind:
            raise SettingError(
                f"data.task.held_out_per_kind is {self.held_out_per_kind} but '{kind}' has {held_out} held-out and "
                f"{train} train problems with numbers from {self.smallest_number} to {self.largest_number}; lower it, "
                "or raise data.task.largest_number"
            )

    def train_problems(self) -> list[Problem]:
        """Returns the problems that are not held out, at most problems_per_kind of each kind."""
        return self._split[0]

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Returns one benchmark, "arithmetic"."""
        return {"arithmetic": self._split[1]}


def _hash(problem: Problem) -> float:
    return hash_fraction(problem.id)


def messages(question: str, system: str | None = None) -> list[dict[str, Any]]:
    """Returns chat messages with one worked problem, then the question."""
    begin = [] if system is None else [{"role": "system", "content": system}]
    return [
        *begin,
        {"role": "user", "content": "2 + 3"},
        {"role": "assistant", "content": "2 + 3 = 5"},
        {"role": "user", "content": question},
    ]


def written(kind: str, numbers: Sequence[int]) -> str:
    """Writes ``("a+b-c", (8, 4, 5))`` as ``8 + 4 - 5``."""
    text = str(numbers[0])
    for operation, number in zip(kind[1::2], numbers[1:], strict=True):
        text += f" {operation} {number}"
    return text


def mirrored(kind: str, numbers: Sequence[int]) -> str:
    """Returns one text for all orders of the terms that may be swapped: all of a sum or product, two of a+b-c."""
    swapping = {"a-b": 1, "a+b-c": 2}.get(kind, len(numbers))
    return written(kind, [*sorted(numbers[:swapping]), *numbers[swapping:]])


def enumerated(kind: str, numbers: range) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields every choice of numbers whose result is not negative, with the result."""
    for chosen in product(numbers, repeat=len(kind[::2])):
        result = chosen[0]
        for operation, number in zip(kind[1::2], chosen[1:], strict=True):
            result = result * number if operation == "*" else result + number if operation == "+" else result - number
        if result >= 0:
            yield chosen, result
