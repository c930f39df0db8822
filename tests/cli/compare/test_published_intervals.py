"""The intervals in benchmarks/compare/*/report.md and docs/evidence.md follow from the runs.csv beside the reports."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from helpers.places import REPOSITORY

from popo_lightning.cli.compare.statistics import Interval, paired

COLUMNS = {"greedy accuracy": "final_greedy", "avg": "final_avg_at_k", "pass": "final_pass_at_k"}  # avg@4, pass@8
REPORTS = sorted((REPOSITORY / "benchmarks" / "compare").glob("*/report.md"))
TABLE = re.compile(r"^## Difference to (\S+)\n.*?\n\n((?:\|[^\n]*\n)+)", re.MULTILINE | re.DOTALL)


def accuracies(folder: Path, arm: str, column: str) -> dict[int, float]:
    """Returns the accuracies of an arm, named "method" or "method, label", by seed."""
    method, _, label = arm.partition(", ")
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["method"], row["sweep"]) == (method, label)]
    return {int(row["seed"]): float(row[column]) for row in rows}


def difference(folder: Path, arm: str, baseline: str, column: str) -> Interval:
    label = arm.partition(", ")[2]
    theirs = f"{baseline}, {label}" if label else baseline
    return paired(accuracies(folder, arm, column), accuracies(folder, theirs, column))


def shown(found: Interval) -> str:
    mean, low, high = (f"{value:+.3f}" for value in (found.mean, found.low, found.high))
    return mean if found.n == 1 or low == mean == high else f"{mean} [{low}, {high}]"


@pytest.mark.parametrize("report", REPORTS, ids=[path.parent.name for path in REPORTS])
def test_differences_of_a_report_have_t_intervals(report: Path) -> None:
    with (report.parent / "runs.csv").open(newline="", encoding="utf-8") as file:
        methods = {row["method"] for row in csv.DictReader(file)}
    checked = 0
    for table in TABLE.finditer(report.read_text("utf-8")):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[2].splitlines())
        for arm, _, *cells in rows:
            for name, cell in zip(header[2:], cells, strict=True):
                assert cell == shown(difference(report.parent, arm, table[1], COLUMNS[name.partition("@")[0]])), (
                    arm,
                    name,
                )
                checked += 1
    assert bool(checked) == (len(methods) > 1), "a report of one method has no method to differ from"


@pytest.mark.parametrize(
    ("row", "comparison", "arm"),
    [
        ("| **POPO** | 0.230 |", "paper_claims_tiny", "popo"),
        ("| DAPO | 0.266 |", "paper_claims_tiny", "dapo"),
        ("| POPO, pi_old | 0.211 |", "paper_claims_tiny", "pi_old"),
        ("| **POPO, rested** (ours) | 0.255 |", "paper_claims_tiny", "popo_rested"),
        ("| at least 10 | 0.253 |", "replay_age", "stale10"),
        ("| at least 30 | 0.231 |", "replay_age", "stale30"),
    ],
)
def test_differences_of_the_evidence_have_t_intervals(row: str, comparison: str, arm: str) -> None:
    lines = (REPOSITORY / "docs" / "evidence.md").read_text("utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(row)]
    found = difference(REPOSITORY / "benchmarks" / "compare" / comparison, arm, "grpo", "final_avg_at_k")
    assert line.split("|")[3].strip() == shown(found)
