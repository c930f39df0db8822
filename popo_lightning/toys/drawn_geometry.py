"""Drawn geometry: only a diagram shows the numbers, and often what is asked.

This is the embedded task with images. A prompt is a diagram and ``x?``, ``area?`` or ``perimeter?``; a correct answer
is written as steps, such as ``45+78=123;180-123=57``, and its last number counts. Problems are enumerated and drawn,
not downloaded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isqrt
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.toys import diagrams
from popo_lightning.toys.countdown import apply
from popo_lightning.toys.diagrams import Figure, png
from popo_lightning.toys.formulas import (
    Formula,
    apex,
    around,
    half_product,
    hypotenuse,
    leg,
    product,
    supplement,
    third_angle,
    total,
)
from popo_lightning.toys.held_out import hash_fraction

Numbers = tuple[int, ...]

MAX_RESPONSE_CHARACTERS = 400
STEP = re.compile(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})", re.ASCII)


# -- kinds of problems -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of problem: its drawing, its question and its solution.

    Args:
        question: Text after the image.
        figure: Figure to draw.
        labels: Labels at the figure's places; ``a`` and ``b`` are the numbers.
        formula: Formula of the solution.
        numbers: Yields all numbers with which the problem is asked.
    """

    question: str
    figure: Figure
    labels: str
    formula: Formula
    numbers: Callable[[], Iterator[Numbers]]

    def write(self, numbers: Numbers) -> list[str]:
        """Returns the texts at the figure's places."""
        written = dict(zip("ab", map(str, numbers), strict=False)) | {"x": "x"}
        return [written[label] for label in self.labels]


def _one_angle() -> Iterator[Numbers]:
    return ((a,) for a in range(10, 100))


def _base_angles() -> Iterator[Numbers]:
    return ((a,) for a in range(10, 86))


def _two_angles() -> Iterator[Numbers]:
    return ((a, b) for a in range(10, 100, 5) for b in range(10, 100, 5) if a + b <= 165)


def _two_sides() -> Iterator[Numbers]:
    return ((a, b) for a in range(2, 13) for b in range(2, 13))


def _two_sides_even() -> Iterator[Numbers]:
    return ((a, b) for a, b in _two_sides() if a * b % 2 == 0)


def _legs() -> Iterator[Numbers]:
    longest = 50
    roots = {n * n for n in range(1, longest + 1)}
    return ((a, b) for a in range(1, longest) for b in range(1, longest) if a * a + b * b in roots)


def _leg_and_hypotenuse() -> Iterator[Numbers]:
    return ((a, isqrt(a * a + b * b)) for a, b in _legs())


KINDS: dict[str, Kind] = {
    "straight line": Kind("x?", diagrams.STRAIGHT_LINE, "ax", supplement, _one_angle),
    "isosceles triangle": Kind("x?", diagrams.ISOSCELES, "ax", apex, _base_angles),
    "third angle": Kind("x?", diagrams.TRIANGLE, "abx", third_angle, _two_angles),
    "exterior angle": Kind("x?", diagrams.EXTERIOR, "abx", total, _two_angles),
    "rectangle area": Kind("area?", diagrams.RECTANGLE, "ab", product, _two_sides),
    "rectangle perimeter": Kind("perimeter?", diagrams.RECTANGLE, "ab", around, _two_sides),
    "triangle area": Kind("area?", diagrams.LEGS, "ab", half_product, _two_sides_even),
    "hypotenuse": Kind("x?", diagrams.RIGHT_TRIANGLE, "abx", hypotenuse, _legs),
    "leg": Kind("x?", diagrams.RIGHT_TRIANGLE, "axb", leg, _leg_and_hypotenuse),
}
# The last two need squares and roots of numbers up to 50. A policy that is built in two minutes does not learn them.
EASY_KINDS = tuple(kind for kind in KINDS if kind not in ("hypotenuse", "leg"))


# -- the task ----------------------------------------------------------------------------------------------------------


def verify_drawn(answer: Any, text: str) -> dict[str, float]:
    """Grades written steps against a whole number.

    score and acc are 1 if the last number written is the answer. format is 1 if the response consists of steps, true or
    not, and true_steps is 1 if all of them are true. Input is bounded to 400 characters and six digits per number.
    """
    wrong = {"score": 0.0, "acc": 0.0, "format": 0.0, "true_steps": 0.0}
    if len(text) > MAX_RESPONSE_CHARACTERS:
        return wrong
    result, all_true = -1, True
    for written in text.strip().split(";"):
        match = STEP.fullmatch(written)
        if match is None:
            return wrong
        result = int(match[4])
        all_true = all_true and apply(Fraction(match[1]), match[2], Fraction(match[3])) == result
    right = float(result == answer)
    return {"score": right, "acc": right, "format": 1.0, "true_steps": float(all_true)}


class DrawnGeometry(Task):
    """Angles, areas, perimeters and sides from diagrams, split into train and held-out by a hash of the numbers.

    A problem is held out by its kind and sorted numbers, in every drawing. Every kind is asked equally often; a kind
    with few numbers has more drawings of each.

    Args:
        kinds: Names of the kinds asked; "hypotenuse" and "leg" are also available.
        problems_per_kind: Number of training problems per kind.
        held_out_problems: Size of the held-out benchmark, over all kinds.
        held_out_share: Fraction of each kind's numbers kept out of training.
    """

    verify = staticmethod(verify_drawn)

    def __init__(
        self,
        kinds: Sequence[str] = EASY_KINDS,
        problems_per_kind: int = 300,
        held_out_problems: int = 504,
        held_out_share: float = 0.25,
    ) -> None:
        unknown = sorted(set(kinds) - set(KINDS)) or [""]
        if not kinds or unknown[0]:
            raise SettingError(f"data.task.kinds names '{unknown[0]}'; use some of {', '.join(KINDS)}")
        for name, count in {"problems_per_kind": problems_per_kind, "held_out_problems": held_out_problems}.items():
            if count < 1:
                raise SettingError(f"data.task.{name} is {count}; use at least 1")
        if not 0 < held_out_share < 1:
            raise SettingError(f"data.task.held_out_share is {held_out_share}; use a share between 0 and 1")
        self.kinds = tuple(kinds)
        self.problems_per_kind = problems_per_kind
        self.held_out_problems = held_out_problems
        self.held_out_share = held_out_share

    def split(self, kind: str) -> tuple[list[Numbers], list[Numbers]]:
        """Returns (training, held-out) numbers of a kind, ordered by hash."""
        fractions = {}
        for numbers in KINDS[kind].numbers():
            problem = f"{kind}:{','.join(map(str, sorted(numbers)))}"
            fractions[numbers] = (hash_fraction(problem), numbers)
        in_order = sorted(fractions, key=fractions.__getitem__)
        train = [numbers for numbers in in_order if fractions[numbers][0] >= self.held_out_share]
        held_out = [numbers for numbers in in_order if fractions[numbers][0] < self.held_out_share]
        if not train or not held_out:
            raise SettingError(
                f"data.task.held_out_share is {self.held_out_share}, which leaves '{kind}' "
                f"{'nothing to train on; lower it' if not train else 'no problem to hold out; raise it'}"
            )
        return train, held_out

    @cached_property
    def _train(self) -> list[Problem]:
        return self._rounds([(kind, self.split(kind)[0]) for kind in self.kinds], self.problems_per_kind)

    @cached_property
    def _held_out(self) -> list[Problem]:
        per_kind = -(-self.held_out_problems // len(self.kinds))
        found = self._rounds([(kind, self.split(kind)[1]) for kind in self.kinds], per_kind)
        return found[: self.held_out_problems]

    def _rounds(self, kinds: Sequence[tuple[str, list[Numbers]]], rounds: int) -> list[Problem]:
        """Makes one problem of each kind per round. A kind that runs out of numbers starts over with new drawings."""
        return [
            problem(kind, numbers[place % len(numbers)], drawing=place // len(numbers))
            for place in range(rounds)
            for kind, numbers in kinds
        ]

    def train_problems(self) -> list[Problem]:
        """Returns the training problems, equally many of each kind."""
        return self._train

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Returns one benchmark, "geometry"."""
        return {"geometry": self._held_out}


def problem(kind: str, numbers: Numbers, drawing: int) -> Problem:
    """Makes a problem with its diagram. Kind, numbers and the drawing's number decide every line."""
    asked = KINDS[kind]
    id = f"{kind}:{','.join(map(str, numbers))}/{drawing}"
    steps = asked.formula(*numbers)
    return Problem(
        id,
        [{"role": "user", "content": f"<image>{asked.question}"}],
        steps[-1][3],
        {"subject": kind, "level": len(steps)},
        (png(asked.figure.draw(asked.write(numbers), random.Random(id))),),
    )
