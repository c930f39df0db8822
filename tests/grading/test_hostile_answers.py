"""Thousands of hostile answers in real grading processes: all counted, none right, no code run, no hang, no crash."""

from __future__ import annotations

import operator
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile_answers import families

from popo_lightning.grading.pool import GradingPool
from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.countdown import CountdownVerifier
from popo_lightning.verifiers.geometry import GeometryVerifier
from popo_lightning.verifiers.math import MathVerifier

LIMIT = 2.0
MAX_FAILURES = 6
"""Answers that may run into the time limit, of over 3,000: the others are refused or graded."""

FORMULAS = [
    "5",
    "\\frac{\\sqrt{3}}{2}",
    "x^2+a+n",
    "0.57",
    "(2,\\infty)",
    "1,-2",
    "x=5",
    "2\\cos(\\pi t)",
    "1+2i",
    "k\\geq2",
]
COUNTDOWN = [{"numbers": [44, 19, 35], "target": 98}, {"numbers": [9, 9], "target": 1}]


def graded(
    verifier: Verifier, golds: list[Any], wrapping: str, marker: Path
) -> tuple[dict[str, Counter[str]], float, set[float]]:
    """Returns failures by family and kind, the seconds taken, and the accuracies."""
    found = families(marker)
    assert sum(len(answers) for answers in found.values()) >= 3_000
    assert len({answer for answers in found.values() for answer in answers}) >= 3_000
    kinds: dict[str, Counter[str]] = {}
    accuracies: set[float] = set()
    with GradingPool(verifier, grading_timeout=LIMIT) as pool:
        pool.grade([(golds[0], "warm")])
        begin = time.monotonic()
        for family, answers in found.items():
            items = [(golds[n % len(golds)], wrapping.replace("ANSWER", answer)) for n, answer in enumerate(answers)]
            grades = pool.grade(items)
            assert len(grades) == len(answers)
            kinds[family] = Counter(grade.failure or "graded" for grade in grades)
            accuracies |= {grade.parts["acc"] for grade in grades}
            right = [a for a, grade in zip(answers, grades, strict=True) if grade.parts["acc"]]
            assert not right, (family, right[:3])
        seconds = time.monotonic() - begin
    return kinds, seconds, accuracies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verifier", "golds", "wrapping"),
    [
        (MathVerifier(), FORMULAS, "So the answer is \\boxed{ANSWER}"),
        (GeometryVerifier(), FORMULAS, "<think>so</think> \\boxed{ANSWER}"),
        (CountdownVerifier(), COUNTDOWN, "<think>so</think> <answer>ANSWER</answer>"),
    ],
    ids=["math", "geometry", "countdown"],
)
def test_hostile_answers_are_counted_and_wrong(
    verifier: Verifier, golds: list[Any], wrapping: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    kinds, seconds, accuracies = graded(verifier, golds, wrapping, marker)
    total = sum(kinds.values(), Counter())
    print(f"\n{type(verifier).__name__}: {total.total()} hostile answers in {seconds:.1f} s: {dict(total)}")
    for family, counts in kinds.items():
        print(f"  {family}: {dict(counts)}")
    assert accuracies == {0.0}
    assert total["crash"] == total["invalid"] == 0
    assert total["timeout"] + total["error"] <= (0 if isinstance(verifier, CountdownVerifier) else MAX_FAILURES)
    assert not marker.exists()


def test_a_memory_bomb_dies_in_its_own_process() -> None:
    """As a verifier, `operator.mul` repeats the response as often as the gold says."""
    with GradingPool(operator.mul) as pool:
        (grade,) = pool.grade([(6 * 1024**3, "x")])
    assert grade.failure == "error"  # without a limit it would have 6 GiB and be "invalid"
