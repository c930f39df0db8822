"""Drawn geometry: only a diagram shows the numbers, and often what is asked.

This is the embedded task with images. A prompt is a diagram and ``x?``, ``area?`` or ``perimeter?``; a correct answer
is written as steps, such as ``45+78=123;180-123=57``, and its last number counts. Problems are enumerated and drawn,
not downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.toys import diagrams, formulas
from popo_lightning.toys.countdown import read_steps, whole_result
from popo_lightning.toys.diagrams import Figure, png
from popo_lightning.toys.formulas import Formula
from popo_lightning.toys.held_out import check_split, hash_fraction

Numbers = tuple[int, ...]


# -- kinds of problems -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of problem: its drawing, its question and its solution.

    Args:
        question: Text after the image.
        figure: Figure to draw.
        labels: Labels at the figure's places; ``a`` and ``b`` are the numbers.
        formula: Formula of the solution.
        numbers: All numbers with which the problem is asked.
    """

    question: str
    figure: Figure
    labels: str
    formula: Formula
    numbers: Sequence[Numbers]

    def write(self, numbers: Numbers) -> list[str]:
        """Returns the texts at the figure's places."""
        written = dict(zip("ab", map(str, numbers), strict=False)) | {"x": "x"}
        return [written[label] for label in self.labels]


_ONE_ANGLE = [(a,) for a in range(10, 100)]
_BASE_ANGLES = [(a,) for a in range(10, 86)]
_TWO_ANGLES = [(a, b) for a in range(10, 100, 5) for b in range(10, 100, 5) if a + b <= 165]
_TWO_SIDES = [(a, b) for a in range(2, 13) for b in range(2, 13)]
_TWO_SIDES_EVEN = [(a, b) for a, b in _TWO_SIDES if a * b % 2 == 0]
_SQUARES = {n * n for n in range(1, 51)}
_LEGS = [(a, b) for a in range(1, 50) for b in range(1, 50) if a * a + b * b in _SQUARES]
_LEG_AND_HYPOTENUSE = [(a, isqrt(a * a + b * b)) for a, b in _LEGS]

KINDS: dict[str, Kind] = {
    "straight line": Kind("x?", diagrams.STRAIGHT_LINE, "ax", formulas.supplement, _ONE_ANGLE),
    "isosceles triangle": Kind("x?", diagrams.ISOSCELES, "ax", formulas.apex, _BASE_ANGLES),
    "third angle": Kind("x?", diagrams.TRIANGLE, "abx", formulas.third_angle, _TWO_ANGLES),
    "exterior angle": Kind("x?", diagrams.EXTERIOR, "abx", formulas.total, _TWO_ANGLES),
    "rectangle area": Kind("area?", diagrams.RECTANGLE, "ab", formulas.product, _TWO_SIDES),
    "rectangle perimeter": Kind("perimeter?", diagrams.RECTANGLE, "ab", formulas.around, _TWO_SIDES),
    "triangle area": Kind("area?", diagrams.LEGS, "ab", formulas.half_product, _TWO_SIDES_EVEN),
    "hypotenuse": Kind("x?", diagrams.RIGHT_TRIANGLE, "abx", formulas.hypotenuse, _LEGS),
    "leg": Kind("x?", diagrams.RIGHT_TRIANGLE, "axb", formulas.leg, _LEG_AND_HYPOTENUSE),
}
# The last two need squares and roots of numbers up to 50. A policy that is built in two minutes does not learn them.
EASY_KINDS = tuple(kind for kind in KINDS if kind not in ("hypotenuse", "leg"))


# -- the task ----------------------------------------------------------------------------------------------------------


def verify_drawn(answer: Any, text: str) -> dict[str, float]:
    """Grades written steps against a whole number.

    score and acc are 1 if the last number written is the answer. format is 1 if the response consists of steps, true or
    not, and true_steps is 1 if all of them are true. Input is bounded to 400 characters and six digits per number.
    """
    steps = read_steps(text)
    if steps is None:
        return {"score": 0.0, "acc": 0.0, "format": 0.0, "true_steps": 0.0}
    correct = float(steps[-1][3] == answer)
    all_true = all(whole_result(left, operation, right) == result for left, operation, right, result in steps)
    return {"score": correct, "acc": correct, "format": 1.0, "true_steps": float(all_true)}


@dataclass(eq=False)
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

    kinds: Sequence[str] = EASY_KINDS
    problems_per_kind: int = 300
    held_out_problems: int = 504
    held_out_share: float = 0.25

    verify = staticmethod(verify_drawn)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS)) or [""]
        if not self.kinds or unknown[0]:
            raise SettingError(f"data.task.kinds names '{unknown[0]}'; use some of {', '.join(KINDS)}")
        check_split(self, "problems_per_kind", "held_out_problems")

    def split(self, kind: str) -> tuple[list[Numbers], list[Numbers]]:
        """Returns (training, held-out) numbers of a kind, ordered by hash."""
        hashed = [
            (hash_fraction(f"{kind}:{','.join(map(str, sorted(numbers)))}"), numbers) for numbers in KINDS[kind].numbers
        ]
        train = [numbers for fraction, numbers in sorted(hashed) if fraction >= self.held_out_share]
        held_out = [numbers for fraction, numbers in sorted(hashed) if fraction < self.held_out_share]
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
