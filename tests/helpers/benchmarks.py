"""Tasks with two benchmarks made by hand, whose names, levels and subjects are as bad as data files can make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from popo_lightning.core.problems import Problem
from popo_lightning.toys.countdown import CountdownSteps, verify_steps

HOSTILE = "[red]a | b[/red] `x`\n\x1b[31m\ud800 é"
SMALL, LARGE = "small", "large/[bold]|`x`"


def verify_or_fail(answer: Any, text: str) -> dict[str, float]:
    """Breaks down over some wrong answers."""
    parts = verify_steps(answer, text)
    if parts["acc"] == 0 and answer["target"] % 2:
        raise ValueError("an odd target")
    return parts


class TwoBenchmarks(CountdownSteps):
    """Countdown's held-out problems in two parts: levels and subjects in the first, one level in the second."""

    verify = staticmethod(verify_or_fail)

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        (problems,) = super().benchmarks().values()
        return {
            SMALL: [replace(problem, info=_info(place)) for place, problem in enumerate(problems[:7])],
            LARGE: [replace(problem, info={"level": 1}) for problem in problems[7:]],
        }


def _info(place: int) -> dict[str, object]:
    info: dict[str, object] = {"level": (10, 2, 2)[place % 3], "kind": ["a", place % 2]}
    return info | ({} if place == 5 else {"subject": (HOSTILE, "sums")[place % 2]})


class CalledMean(CountdownSteps):
    """A benchmark with a name that stands for all of them."""

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        (problems,) = super().benchmarks().values()
        return {"mean": problems[:6], "other": problems[6:]}


class NoTrainingSet(TwoBenchmarks):
    """As on a machine that has the benchmarks alone."""

    def train_problems(self) -> list[Problem]:
        raise AssertionError("read to validate")
