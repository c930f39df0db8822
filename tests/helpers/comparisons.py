"""Comparisons with runs written by hand, so that every number of a report can be worked out on paper."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from helpers.places import REPOSITORY
from popo_lightning.cli.compare.command import parsed
from popo_lightning.cli.compare.plan import PlannedRun, plan, write_record
from popo_lightning.cli.compare.settings import Comparison

ITERATIONS = 40
EVERY = 10


def write_comparison(folder: Path, methods: Mapping[str, Any] | None = None, **settings: Any) -> Path:
    """Writes a comparison's YAML with empty configuration files."""
    for name in ("task", "grpo", "popo", "dapo"):
        (folder / f"{name}.yaml").write_text("{}\n")
    found = methods or {name: {"config": [str(folder / f"{name}.yaml")]} for name in ("grpo", "popo", "dapo")}
    content = {"name": "hand", "task": [str(folder / "task.yaml")], "methods": dict(found), "seeds": [1, 2, 3]}
    content |= {"root": str(folder / "root"), "baseline": "grpo"} | settings
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read_comparison(path: Path, *more: str) -> Comparison:
    comparison = parsed(["--config", str(path), *more])
    comparison.check()
    return comparison


def planned(comparison: Comparison, method: str, seed: int, sweep: str = "") -> PlannedRun:
    (found,) = [r for r in plan(comparison) if (r.arm.method, r.arm.sweep, r.seed) == (method, sweep, seed)]
    return found


def write_run(
    run: PlannedRun,
    avg: Sequence[float],
    responses: int = 100,
    seconds: float = 2.0,
    tokens: int = 50,
    effective: float = 0.5,
    ages: Mapping[int, float] | None = None,
) -> None:
    """Writes a finished run with an evaluation every ten iterations. Greedy is 0.1 above avg@4, pass@8 0.2 above."""
    run.folder.mkdir(parents=True)
    write_record(run)
    evaluations = [
        {
            "iteration": EVERY * place,
            "eval/countdown/greedy": value + 0.1,
            "eval/countdown/avg_at_4": value,
            "eval/countdown/pass_at_8": value + 0.2,
            "eval/countdown/seconds": 9.0,
        }
        for place, value in enumerate(avg)
    ]
    last = EVERY * (len(avg) - 1)
    rows: list[dict[str, Any]] = [
        {
            "step": i,
            "total/responses": responses * i,
            "time/iteration": seconds,
            "train/tokens": tokens,
            "total/tokens": 25 * i,
            "rollout/effective_share": effective,
            "replay/share": 1 - effective,
            "policy/entropy": 1.0 if i <= last - 10 else 0.5,
            "weight/replayed_max": 1.0 + i / 100,
            **{f"weight/ess_age_{age}": ess for age, ess in (ages or {}).items()},
        }
        for i in range(1, last + 1)
    ] + [{"step": each["iteration"], **{k: v for k, v in each.items() if k != "iteration"}} for each in evaluations]
    with (run.folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    summary = {
        "method": run.arm.method,
        "seed": run.seed,
        "iterations": last,
        "responses": responses * last,
        "dynamic_sampling_responses": round(responses * last / effective),
        "wall_seconds": 100.0,
        "seconds": {"generate": 30.0, "train": 40.0, "iteration": seconds * last, "evaluation": 9.0 * len(avg)},
        "evaluations": evaluations,
    }
    (run.folder / "summary.json").write_text(json.dumps(summary))
    results = run.folder / "evaluations" / f"iteration-{last:06d}" / "results.json"
    results.parent.mkdir(parents=True)
    benchmark = {"settings": {"samples": 8}, "numbers": {"problems": 500}}
    results.write_text(json.dumps({"benchmarks": {"countdown": benchmark}}))


def cells(report: str, title: str, row: str) -> dict[str, str]:
    """Returns a row of the table below a title of the report, by the table's header."""
    table = report.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (found,) = [line for line in lines[2:] if line[0] == row]
    return dict(zip(lines[0], found, strict=True))


def method_files(*names: str) -> dict[str, Any]:
    """Returns methods with the shipped configurations."""
    return {name: {"config": [str(REPOSITORY / "configs" / "method" / f"{name}.yaml")]} for name in names}
