"""Countdown with written steps: reach a target from three to five numbers, each used exactly once.

This is the embedded task. A prompt is ``2,7,5>10:`` and a correct answer ``7-2=5;5*2=10``: every step takes two of the
available numbers and puts their result back, and the last result is the target. Problems are enumerated, not
downloaded; an exact search proves each one solvable.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, permutations
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.number_settings import shortened
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.core.user_question import ASKED, gold_like
from popo_lightning.toys.held_out import check_split, hash_fraction

Step = tuple[int, str, int, int]  # left operand, operation, right operand, result

MAX_RESPONSE_CHARACTERS = 400
MAX_DRAWN = 10**7  # maximum sets of numbers; the solutions of each are enumerated
QUESTION = re.compile(r"([0-9]{1,6}(?:,[0-9]{1,6}){0,8})>[0-9]{1,6}:?", re.ASCII)
STEP = r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})"
STEPS = re.compile(f"{STEP}(?:;{STEP})*")


def whole_result(left: int, operation: str, right: int) -> int | None:
    """Returns the result for non-negative whole numbers; None if it is not such a number."""
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right if left >= right else None
    if operation == "*":
        return left * right
    return left // right if right and left % right == 0 else None


def solutions(numbers: Sequence[int], operations: str) -> Iterator[list[Step]]:
    """Yields every way to combine all numbers, as steps, each once.

    Results must be whole and not negative, so that each can be written down and read back without ambiguity.
    """
    if len(numbers) == 1:
        yield []
        return
    tried = set()
    for i, j in permutations(range(len(numbers)), 2):
        left, right = numbers[i], numbers[j]
        if (left, right) in tried:
            continue  # equal numbers give equal ways
        tried.add((left, right))
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for operation in operations:
            if operation in "+*" and left < right:
                continue  # the mirror image is the same step
            result = whole_result(left, operation, right)
            if result is not None:
                for steps in solutions([*rest, result], operations):
                    yield [(left, operation, right, result), *steps]


def write_steps(steps: Sequence[Step]) -> str:
    """Writes ``[(7, "-", 2, 5), (5, "*", 2, 10)]`` as ``7-2=5;5*2=10``."""
    return ";".join(f"{left}{operation}{right}={result}" for left, operation, right, result in steps)


def read_steps(text: str) -> list[Step] | None:
    """Inverse of :func:`write_steps`; None for any other text, or a long one."""
    if len(text) > MAX_RESPONSE_CHARACTERS or STEPS.fullmatch(text.strip()) is None:
        return None
    found = re.findall(STEP, text)
    return [(int(left), operation, int(right), int(result)) for left, operation, right, result in found]


def verify_steps(answer: Any, text: str) -> dict[str, float]:
    """Grades written steps against ``{"numbers": [...], "target": int}``.

    score and acc are 1 for a correct answer, else 0. format is 1 if every step is a true equation over available
    numbers and all are used, regardless of the target. Input is bounded to 400 characters and six digits per number.
    Arithmetic is exact.
    """
    at_hand = sorted(answer["numbers"])
    wrong = {"score": 0.0, "acc": 0.0, "format": 0.0}
    steps = read_steps(text)
    if steps is None:
        return wrong
    for left, operation, right, result in steps:
        for used in (left, right):
            if used not in at_hand:
                return wrong
            at_hand.remove(used)
        if whole_result(left, operation, right) != result:
            return wrong
        at_hand.append(result)
    if len(at_hand) != 1:
        return wrong
    right_answer = float(at_hand[0] == answer["target"])
    return {"score": right_answer, "acc": right_answer, "format": 1.0}


def counts_of(numbers: int | Sequence[int]) -> list[int]:
    """Returns the counts of numbers in a setting as a list."""
    return [numbers] if isinstance(numbers, int) else list(numbers)


@dataclass(eq=False)
class CountdownSteps(Task):
    """Every solvable problem over small numbers, split into train and held-out by a hash of the problem.

    A problem is held out by its sorted numbers and target, in any order of the prompt.

    Args:
        numbers: Count of numbers per problem, 2 to 5, or a list of counts. Each count in a list gives equally many
            problems (as many as the count with the fewest).
        largest_number: Numbers are drawn from 1 to this.
        operations: Allowed operations of ``+-*/``; division must give a whole number.
        largest_target: Targets are 1 to this.
        held_out_problems: Size of the held-out benchmark.
        held_out_share: Fraction of all problems kept out of training.
        min_ways: Minimum number of ways to write a solution. The more ways, the easier the problem.
        orders: Number of orders in which the numbers of a training problem are asked, each as its own prompt.
        seed: Seed of the orders.
    """

    numbers: int | list[int] = 3
    largest_number: int = 12
    operations: str = "+-*"
    largest_target: int = 99
    held_out_problems: int = 500
    held_out_share: float = 0.33
    min_ways: int = 2
    orders: int = 6
    seed: int = 0

    verify = staticmethod(verify_steps)

    def __post_init__(self) -> None:
        counts = counts_of(self.numbers)
        if not all(2 <= count <= 5 for count in counts):
            raise SettingError(f"data.task.numbers is {self.numbers}; Countdown is enumerated for 2 to 5 numbers")
        if not counts or len(set(counts)) < len(counts):
            raise SettingError(f"data.task.numbers is {self.numbers}; name one count or more, none twice")
        if not self.operations or set(self.operations) - set("+-*/"):
            raise SettingError(f"data.task.operations is '{self.operations}'; use some of + - * /")
        check_split(self, "largest_number", "largest_target", "held_out_problems", "min_ways", "orders")
        for count in counts:
            drawn = math.comb(self.largest_number + count - 1, count)
            if drawn > MAX_DRAWN:
                raise SettingError(
                    f"data.task.largest_number is {self.largest_number}, of which {count} numbers (data.task.numbers) "
                    f"are drawn in {shortened(drawn)} ways, too many to enumerate; lower one, to {MAX_DRAWN} at most"
                )

    @cached_property
    def _split(self) -> tuple[list[Problem], list[Problem]]:
        """Training and held-out problems ordered by hash, one of each count of numbers in turn."""
        split = [self._split_of(count) for count in counts_of(self.numbers)]
        train, held_out = (
            [problem for in_turn in zip(*part, strict=False) for _, problem in in_turn]  # up to the end of the shortest
            for part in zip(*split, strict=True)
        )
        if len(held_out) < self.held_out_problems:
            raise SettingError(
                f"data.task.held_out_problems is {self.held_out_problems} but only {len(held_out)} problems are "
                f"held out; lower it, or raise data.task.held_out_share ({self.held_out_share})"
            )
        return train, held_out[: self.held_out_problems]

    def _split_of(self, count: int) -> tuple[list[tuple[float, Problem]], list[tuple[float, Problem]]]:
        """Returns (training, held-out) problems with this count of numbers, each with its hash, ordered by hash."""
        train: list[tuple[float, Problem]] = []
        held_out: list[tuple[float, Problem]] = []
        for numbers in combinations_with_replacement(range(1, self.largest_number + 1), count):
            ways = Counter(steps[-1][3] for steps in solutions(numbers, self.operations))
            for target in sorted(t for t, n in ways.items() if n >= self.min_ways and 1 <= t <= self.largest_target):
                id = f"{','.join(map(str, numbers))}>{target}"
                fraction = hash_fraction(id)
                if fraction < self.held_out_share:
                    held_out.append((fraction, self._problems(id, numbers, target, 1)[0]))
                else:
                    train += [(fraction, problem) for problem in self._problems(id, numbers, target, self.orders)]
        return sorted(train, key=lambda pair: pair[0]), sorted(held_out, key=lambda pair: pair[0])

    def _problems(self, id: str, numbers: Sequence[int], target: int, orders: int) -> list[Problem]:
        every_order = sorted(set(permutations(numbers)))
        random.Random(f"{self.seed}/{id}").shuffle(every_order)
        answer = {"numbers": list(numbers), "target": target}
        written = [f"{','.join(map(str, order))}>{target}" for order in every_order[:orders]]
        return [Problem(text, f"{text}:", answer, {"level": len(numbers)}) for text in written]

    def ask(self, question: str, images: Sequence[str] = (), gold: str | None = None) -> Problem:
        """Asks ``2,7,5>10``, with or without the colon. Any other text is asked unchanged, without a gold answer."""
        found = QUESTION.fullmatch(question.strip())
        if images:
            raise SettingError(f"--image is '{images[0]}', but Countdown has no images; leave it out")
        if found is None and gold is not None:
            raise SettingError(f"--gold is '{gold}', but PROMPT names no numbers and target as 2,7,5>10 does; do so")
        if found is None:
            return Problem(ASKED, question, None)
        numbers = [int(number) for number in found[1].split(",")]
        answer = None if gold is None else {"numbers": numbers, "target": gold_like(1, gold)}
        return Problem(ASKED, f"{found[0].removesuffix(':')}:", answer)

    def train_problems(self) -> list[Problem]:
        """Returns all problems that are not held out."""
        return self._split[0]

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Returns one benchmark, "countdown"."""
        return {"countdown": self._split[1]}
