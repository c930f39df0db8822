"""Reads what a run measured of a policy that it has saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from popo_lightning.evaluation.results import Numbers
from popo_lightning.runs.folder import EVALUATIONS, RESULTS


@dataclass(frozen=True)
class Measured:
    """An evaluation.

    Args:
        iteration: Iteration after which the run evaluated.
        benchmarks: Numbers by benchmark and label; the mean over all benchmarks counts as one.
        settings: Settings of each benchmark's evaluation, if known.
    """

    iteration: int
    benchmarks: Mapping[str, Numbers]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def measured_after(run: Path, iteration: int) -> Measured | None:
    """The evaluation after an iteration of a run; None if there is none."""
    return next((each for each in measured_in(run) if each.iteration == iteration), None)


def measured_in(run: Path) -> Iterator[Measured]:
    """Evaluations during training whose files can be read."""
    for file in sorted((run / EVALUATIONS).glob(f"iteration-*/{RESULTS}")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            benchmarks = content["benchmarks"]
            numbers = {name: _numbers(each["numbers"]) for name, each in benchmarks.items()}
            if mean := _numbers(content.get("mean", {})):
                numbers["mean"] = mean
            settings = {name: dict(each["settings"]) for name, each in benchmarks.items()}
            yield Measured(int(content["iteration"]), numbers, settings)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # a damaged file adds nothing to the report


def _numbers(content: Mapping[str, Any]) -> Numbers:
    return {str(name): float(value) for name, value in content.items() if isinstance(value, int | float)}
