"""Reads files of a run's folder. Damaged lines are counted and left out; hostile ones are only text."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from popo_lightning.core.errors import SettingError

METRICS, SAMPLES, SUMMARY, RECORD, CONFIG = "metrics.csv", "samples.jsonl", "summary.json", "run.json", "config.yaml"
EVALUATIONS, RESULTS = "evaluations", "results.json"
SIGNS = (METRICS, SAMPLES, SUMMARY, RECORD, EVALUATIONS)
LARGEST_DOCUMENT = 20 * 2**20  # bytes of a JSON or YAML document; a run's own have a thousandth of that
LARGEST_LINE = 4 * 2**20  # characters of a line of JSON


Skipped = Counter[str]
"""Damaged lines of each file, by its path in the run's folder; a whole document counts as one."""


def check_run(folder: Path) -> None:
    """Refuses a folder that holds no run.

    Raises:
        SettingError: The folder does not exist, or has no file of a run.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise SettingError(f"RUN is '{folder}', which {what}; name a run's folder, as runs/countdown_tiny/popo-seed1")
    if not any((folder / name).exists() for name in SIGNS):
        inside = sorted({path.parent for pattern in ("*/", "*/*/") for path in folder.glob(f"{pattern}{METRICS}")})
        there = f"name one of {', '.join(map(str, inside[:5]))}" if inside else "name a folder that popo fit wrote"
        raise SettingError(f"RUN is '{folder}', which holds no run; {there}")


def metric_rows(folder: Path, skipped: Skipped) -> dict[int, dict[str, float]]:
    """Finite numbers of metrics.csv by iteration; the rows of one iteration are merged.

    Args:
        folder: Folder of the run.
        skipped: Counts damaged lines.
    """
    path = folder / METRICS
    found: dict[int, dict[str, float]] = {}
    if not path.is_file():
        return found
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        names = _cells(file.readline())
        for line in file:
            numbers = _numbers(names, _cells(line)) if line.endswith("\n") else None
            if numbers is None or not (step := numbers.pop("step", -1.0)).is_integer() or step < 0:
                skipped[METRICS] += 1
            else:
                found.setdefault(int(step), {}).update(numbers)
    return dict(sorted(found.items()))


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _numbers(names: list[str], cells: list[str]) -> dict[str, float] | None:
    """The finite numbers of a row; None if a cell is no number or the number of cells is wrong."""
    try:
        numbers = {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell}
    except ValueError:
        return None
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def response_rows(path: Path, name: str, skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Yields the objects with a response of a file of JSON lines.

    Args:
        path: Path of the file.
        name: Name under which damaged lines are counted.
        skipped: Counts damaged lines.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(LARGEST_LINE):
            if not line.endswith("\n"):  # half-written, or endless
                while (rest := file.readline(LARGEST_LINE)) and not rest.endswith("\n"):
                    pass
                skipped[name] += 1
                continue
            row = _parsed(line)
            if isinstance(row, dict) and isinstance(row.get("response"), str):
                yield row
            elif line.strip():
                skipped[name] += 1


def document(folder: Path, name: str, skipped: Skipped) -> dict[str, Any]:
    """A JSON object of a run's folder; empty if the file is missing, or if it is damaged, which is counted."""
    path = folder / name
    if not path.is_file():
        return {}
    found = _parsed(path.read_text("utf-8", errors="replace")) if path.stat().st_size <= LARGEST_DOCUMENT else None
    if not isinstance(found, dict):
        skipped[name] += 1
        return {}
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def evaluations(folder: Path, skipped: Skipped) -> list[dict[str, Any]]:
    """Each results.json with its folder's name as ``label``: those of training in order, then validate and test."""
    found = []
    for path in sorted((folder / EVALUATIONS).glob(f"*/{RESULTS}")):
        label = path.parent.name
        content = document(folder, f"{EVALUATIONS}/{label}/{RESULTS}", skipped)
        benchmarks, iteration = content.get("benchmarks"), finite(content.get("iteration"))
        if isinstance(benchmarks, dict) and iteration is not None:
            numbers = {name: _benchmark(each) for name, each in benchmarks.items()}
            mean = _finite_of(content.get("mean"))
            found.append({"label": label, "iteration": iteration, "mean": mean, "benchmarks": numbers})
        elif content:
            skipped[f"{EVALUATIONS}/{label}/{RESULTS}"] += 1
    return sorted(found, key=lambda each: (not re.fullmatch(r"iteration-\d+", each["label"]), each["iteration"]))


def _benchmark(found: Any) -> dict[str, Any]:
    content = found if isinstance(found, dict) else {}
    breakdown = content.get("breakdown")
    fields = breakdown.items() if isinstance(breakdown, dict) else ()
    return {
        "numbers": _finite_of(content.get("numbers")),
        "breakdown": {
            field: {value: _finite_of(numbers) for value, numbers in values.items()}
            for field, values in fields
            if isinstance(values, dict)
        },
    }


def _finite_of(numbers: Any) -> dict[str, float]:
    if not isinstance(numbers, dict):
        return {}
    return {name: value for name, number in numbers.items() if (value := finite(number)) is not None}


def finite(value: Any) -> float | None:
    """A number rounded to six digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(f"{value:.6g}") if math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None
