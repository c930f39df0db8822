"""The output of a comparison: report.md, runs.csv, curves.csv, and the tables for the terminal."""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from popo_lightning.cli.compare.collection import Collection
from popo_lightning.cli.compare.costs import age_section, cost_section, health_section, phase_section
from popo_lightning.cli.compare.curves import AXES, RunResult
from popo_lightning.cli.compare.frontier import frontier_section
from popo_lightning.cli.compare.plan import planned_run
from popo_lightning.cli.compare.runs import Outcome
from popo_lightning.cli.compare.settings import METRICS
from popo_lightning.cli.compare.tables import Section, accuracy_section, difference_section, sweep_section
from popo_lightning.cli.compare.target import accuracy_target, cost_to_target, target_section
from popo_lightning.core.whole_files import replaced


def main_sections(found: Collection) -> list[Section]:
    """Sections of the report that answer: how good, how much better, how fast, at what cost."""
    comparison = found.comparison
    others = list(dict.fromkeys(filter(None, (comparison.baseline, comparison.dynamic_sampling))))
    sections = [
        accuracy_section(found),
        *(difference_section(found, method) for method in others),
        target_section(found),
        sweep_section(found),
        frontier_section(found),
        cost_section(found),
    ]
    return [section for section in sections if section is not None]


def other_sections(found: Collection) -> list[Section]:
    """Sections of the report that help to explain the results."""
    return [
        section for section in (health_section(found), age_section(found), phase_section(found)) if section is not None
    ]


def write_report(found: Collection, failures: Sequence[Outcome], figures: Mapping[str, str]) -> list[Path]:
    """Writes all files of the report except the figures.

    Args:
        found: Runs of the comparison.
        failures: Runs that failed in this call.
        figures: Captions of the figures by file name.

    Returns:
        Paths of the files.
    """
    folder = found.comparison.folder
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.md": markdown(found, failures, figures),
        "runs.csv": _table([run_row(found, run) for run in found.runs]),
        "curves.csv": _table([row for run in found.runs for row in curve_rows(run)]),
    }
    for name, content in contents.items():
        with replaced(folder / name) as file:
            file.write(content)
    return [folder / name for name in contents]


def markdown(found: Collection, failures: Sequence[Outcome], figures: Mapping[str, str]) -> str:
    """The report as Markdown."""
    blocks = [f"# {found.comparison.name}", "\n".join(f"- {line}" for line in facts(found))]
    if found.runs:
        blocks += [_as_markdown(section) for section in main_sections(found)]
        blocks += [f"![{caption}]({name})\n\n{caption}" for name, caption in figures.items()]
        blocks += [_as_markdown(section) for section in other_sections(found)]
    blocks += [_absent(found, failures), _settings(found)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def facts(found: Collection) -> list[str]:
    """Sentences about what the numbers rest on."""
    counts = sorted({len(seeds) for seeds in found.arms.values()})
    seeds = " to ".join(map(str, sorted({counts[0], counts[-1]}))) if counts else "0"
    lines = [f"{len(found.runs)} finished runs: {len(found.arms)} methods or variants of {seeds} seeds each."]
    benchmarks = sorted({(name, *size) for run in found.runs for name, size in run.benchmarks.items()})
    lines += [f"Evaluated on {name}: {n:,} problems, {samples} samples each." for name, n, samples in benchmarks]
    if any(not run.benchmarks for run in found.runs):
        lines.append("Of some runs it is not known how many problems they were evaluated on.")
    if counts and counts[-1] > 1:
        lines.append(
            "Brackets behind accuracies and their differences are 95% t intervals over seeds, of a difference over the "
            "differences seed by seed: they tell how much the seed matters, not the choice of problems, task or "
            "settings."
        )
    if counts and counts[0] == 1:
        lines.append("A method with one seed has no interval: nothing is known of how much the seed matters.")
    if counts and 1 < counts[0] < 5:
        lines.append(
            "With fewer than five seeds such an interval is wide, since so few differences hardly tell how much they "
            "vary: one that holds 0 leaves the order of two methods open."
        )
    if len(found.arms) > 2 and counts and counts[-1] > 1:
        lines.append(
            "Each interval is for itself: of twenty comparisons without a difference one leaves 0 out by chance."
        )
    if found.missing:
        lines.append(f"{len(found.missing)} of the runs asked for are not in these numbers; they are named below.")
    if len(found.circumstances) > 1:
        lines.append("The runs were not all made under the same circumstances:")
    return lines + [f"Made with {told}." for told in found.circumstances]


def _as_markdown(section: Section) -> str:
    notes = "\n".join(section.notes)
    return f"## {section.table.title}\n\n{notes}\n\n{plain_table(section.table.header, section.table.rows)}"


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with names on the left and numbers on the right. All words have passed the settings' check."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _absent(found: Collection, failures: Sequence[Outcome]) -> str:
    failed = {outcome.run.folder: outcome.reason.splitlines()[0] for outcome in failures}
    lines = [
        f"- {run.label}: {failed.get(run.folder, 'not finished')} "
        f"({os.path.relpath(run.folder, found.comparison.folder)}/log.txt)"
        for run in found.missing
    ] + [f"- {line}" for line in found.left_out]
    return "## Not in these numbers\n\n" + "\n".join(lines) if lines else ""


def _settings(found: Collection) -> str:
    """The command of each arm."""
    lines = []
    for arm, seeds in found.arms.items():
        run = planned_run(found.comparison, arm, next(iter(seeds)))
        files = " ".join(f"--config {shlex.quote(file)}" for file in run.config)
        lines.append(f"popo fit {files} {shlex.join(run.settings)} --seed_everything=SEED")
    return "## Commands\n\n```bash\n" + "\n".join(lines) + "\n```" if lines else ""


def run_row(found: Collection, run: RunResult) -> dict[str, Any]:
    """A row of runs.csv."""
    took = cost_to_target(found, run)
    row: dict[str, Any] = {"method": run.arm.method, "sweep": run.arm.sweep, "seed": run.seed}
    row |= {f"final_{metric}": run.final(metric, found.comparison.final_evaluations) for metric in METRICS}
    row |= {
        "target": accuracy_target(found, run),
        "iterations_to_target": took and took.iterations,
        "responses_to_target": took and took.responses,
        "seconds_to_target": took and took.seconds,
    }
    row |= run.totals | run.health
    row |= {f"ess_age_{age}": value for age, value in run.ess_by_age.items()}
    row |= {f"seconds_{phase}": value for phase, value in run.phases.items() if phase != "iteration"}
    return row | {"folder": os.path.relpath(run.folder, found.comparison.folder)}


def curve_rows(run: RunResult) -> list[dict[str, Any]]:
    """Rows of curves.csv."""
    name = {"method": run.arm.method, "sweep": run.arm.sweep, "seed": run.seed}
    return [name | {axis: getattr(point, axis) for axis in AXES} | point.numbers for point in run.points]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with the columns of all rows; a missing value is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: None if value != value else value for name, value in row.items()})  # NaN is not itself
    return text.getvalue()
