"""Tasks with two benchmarks made by hand. Names, levels and subjects are as bad as data files can make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from popo_lightning.core.problems import Problem
from popo_lightning.toys.countdown import CountdownSteps, verify_steps

HOSTILE = "[red]a | b[/red] `x`\n\x1b[31m\ud800 é"
SMALL, LARGE = "small", "large/[bold]|`x`"


def verify_or_fail(answer: Any, text: str) -> dict[str, float]:
    """Raises for some wrong answers, and accepts every answer to some problems, whatever policy is evaluated."""
    parts = verify_steps(answer, text)
    if answer["target"] % 4 == 0:
        return parts | {"score": 1.0, "acc": 1.0}
    if parts["acc"] == 0 and answer["target"] % 2:
        raise ValueError("an odd target")
    return parts


class TwoBenchmarks(CountdownSteps):
    """Splits Countdown's held-out problems in two: the first part has levels and subjects, the second one level."""

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
    """One benchmark is called `mean`, which is also the name of the average over benchmarks."""

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        (problems,) = super().benchmarks().values()
        return {"mean": problems[:6], "other": problems[6:]}


class NoTrainingSet(TwoBenchmarks):
    """Fails if training problems are read, as on a machine that has only the benchmarks."""

    def train_problems(self) -> list[Problem]:
        raise AssertionError("read to validate")
