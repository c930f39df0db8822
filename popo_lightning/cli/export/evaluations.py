"""Reads what a run measured of a policy that it has saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from popo_lightning.cli.export.saved_policy import SavedPolicy
from popo_lightning.evaluation.results import Numbers, by_benchmark
from popo_lightning.runs.folder import EVALUATIONS

RESULTS = "results.json"


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


def last_measured(saved: SavedPolicy) -> Measured | None:
    """The newest evaluation that is no newer than a saved policy; None if there is none.

    Args:
        saved: The policy.
    """
    found = list(_in_folder(saved.run)) if saved.run is not None else []
    history = saved.state.get("callbacks", {}).get("Evaluation", {}).get("history", [])
    found += [Measured(int(entry["iteration"]), by_benchmark(entry)) for entry in history]
    past = [each for each in found if each.iteration <= saved.iterations]
    return max(past, key=lambda each: each.iteration, default=None)  # the first of two with the same iteration


def measured_after(run: Path, iteration: int) -> Measured | None:
    """The evaluation after an iteration of a run; None if there is none."""
    return next((each for each in _in_folder(run) if each.iteration == iteration), None)


def _in_folder(run: Path) -> Iterator[Measured]:
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
