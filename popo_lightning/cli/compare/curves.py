"""A finished run in a comparison, read from its metrics.csv, summary.json and results.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lightning.callbacks.summary import flatten_evaluation
from popo_lightning.cli.compare.plan import SUMMARY, Arm
from popo_lightning.cli.compare.settings import METRICS
from popo_lightning.cli.compare.statistics import mean
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.metrics.table import numbers_by_iteration

AXES = ("iteration", "responses", "seconds", "tokens")
EFFECTIVE = "rollout/effective_share"
AT_THE_END = 10  # iterations
AGE = re.compile(r"weight/ess_age_(\d+)")


@dataclass(frozen=True)
class Point:
    """An evaluation.

    Args:
        iteration: Number of rollout iterations before it.
        responses: Responses generated for training before it, discarded ones included.
        seconds: Training time before it, without evaluations and process starts.
        tokens: Response tokens trained on before it.
        numbers: Accuracies by fixed name (greedy, avg_at_k, pass_at_k) and by metric name (eval/...).
    """

    iteration: float
    responses: float
    seconds: float
    tokens: float
    numbers: dict[str, float]


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        arm: Method and sweep label.
        seed: Seed of the run.
        folder: Folder of the run.
        points: Its evaluations in order.
        totals: iterations, responses, tokens (trained on), generated_tokens, seconds, wall_seconds and
            dynamic_sampling_responses at the end.
        health: Shares, ages, clipping, entropy and weights; see :func:`health`.
        ess_by_age: Mean effective sample size of the weights by age of the replayed groups.
        effective: Effective share of fresh groups by iteration.
        phases: Wall seconds by phase.
        ks: k of avg@k and of pass@k, if benchmarks share one.
        benchmarks: Problems and samples of each benchmark in the last evaluation.
    """

    arm: Arm
    seed: int
    folder: Path
    points: list[Point]
    totals: dict[str, float]
    health: dict[str, float]
    ess_by_age: dict[int, float]
    effective: dict[int, float]
    phases: dict[str, float]
    ks: dict[str, int | None]
    benchmarks: dict[str, tuple[int, int]]

    def curve(self, metric: str) -> list[Point]:
        """The evaluations that have the metric."""
        return [point for point in self.points if metric in point.numbers]

    def final(self, metric: str, evaluations: int) -> float:
        """Mean of the last evaluations after training began; NaN if there is none."""
        after = [point.numbers[metric] for point in self.curve(metric) if point.iteration > 0]
        return mean(after[-evaluations:])


def read_run(folder: Path, arm: Arm, seed: int) -> RunResult:
    """Reads a finished run.

    Raises:
        SettingError: Its files are damaged.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        rows = numbers_by_iteration(folder / "metrics.csv")
        entries = [{k: float(v) for k, v in entry.items()} for entry in summary["evaluations"]]
        last = flatten_evaluation(entries[-1]) if entries else {}
        return RunResult(
            arm=arm,
            seed=seed,
            folder=folder,
            points=points(entries, rows),
            totals=_totals(summary, rows),
            health=health(rows),
            ess_by_age=ess_by_age(rows),
            effective={i: row[EFFECTIVE] for i, row in rows.items() if EFFECTIVE in row},
            phases={k: float(v) for k, v in summary["seconds"].items()},
            ks={name: None if last.get(name) is None else int(last[name] or 0) for name in ("avg_k", "pass_k")},
            benchmarks=_benchmarks(folder, int(entries[-1]["iteration"])) if entries else {},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(
            f"root has the folder '{folder}', whose files cannot be read ({reason(error)}); delete it to have that run "
            "made again"
        ) from error


def points(entries: Sequence[Mapping[str, float]], rows: Mapping[int, Mapping[str, float]]) -> list[Point]:
    """Each evaluation with what the run had spent by then."""
    found = []
    for entry in entries:
        iteration = entry["iteration"]
        before = [row for i, row in rows.items() if i <= iteration]
        fixed = {
            name: value
            for name, value in flatten_evaluation(dict(entry)).items()
            if name in METRICS and value is not None
        }
        found.append(
            Point(
                iteration=iteration,
                responses=max((row.get("total/responses", 0.0) for row in before), default=0.0),
                seconds=sum(row.get("time/iteration", 0.0) for row in before),
                tokens=sum(row.get("train/tokens", 0.0) for row in before),
                numbers=fixed | {name: value for name, value in entry.items() if name.startswith("eval/")},
            )
        )
    return found


def health(rows: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Shares, ages, clipping, entropy and weights of a run; NaN if its method has no such number."""

    def column(name: str) -> list[float]:
        return [row[name] for row in rows.values() if name in row]

    return {
        "effective_share": mean(column(EFFECTIVE)),
        "replay_share": mean(column("replay/share")),
        "age_mean": mean(column("replay/age_mean")),
        "clip_frac": mean(column("policy/clip_frac")),
        "entropy_end": mean(column("policy/entropy")[-AT_THE_END:]),
        "weight_max": max(column("weight/replayed_max"), default=math.nan),
    }


def ess_by_age(rows: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """Mean effective sample size by age, over the iterations that replayed groups of that age."""
    found: dict[int, list[float]] = {}
    for row in rows.values():
        for name, value in row.items():
            match = AGE.fullmatch(name)
            if match:
                found.setdefault(int(match[1]), []).append(value)
    return {age: mean(values) for age, values in sorted(found.items())}


def _totals(summary: Mapping[str, Any], rows: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    needed = summary.get("dynamic_sampling_responses")
    return {
        "iterations": float(summary["iterations"]),
        "responses": float(summary["responses"]),
        "dynamic_sampling_responses": math.nan if needed is None else float(needed),
        "tokens": sum(row.get("train/tokens", 0.0) for row in rows.values()),
        "generated_tokens": max((row.get("total/tokens", 0.0) for row in rows.values()), default=0.0),
        "seconds": sum(row.get("time/iteration", 0.0) for row in rows.values()),
        "wall_seconds": float(summary["wall_seconds"]),
    }


def _benchmarks(folder: Path, iteration: int) -> dict[str, tuple[int, int]]:
    path = folder / "evaluations" / f"iteration-{iteration:06d}" / "results.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())["benchmarks"]
    return {name: (int(b["numbers"]["problems"]), int(b["settings"]["samples"])) for name, b in found.items()}
