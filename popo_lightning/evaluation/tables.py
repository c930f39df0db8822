"""Evaluation tables, for a terminal and for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table as RichTable
from rich.text import Text

from popo_lightning.core.markdown import markdown_table
from popo_lightning.evaluation.benchmarks import MEAN
from popo_lightning.evaluation.results import EvaluationResult, Numbers, by_benchmark

SHOWN_CHARACTERS = 60
SHOWN_PARTS = 60


@dataclass(frozen=True)
class Table:
    """The content of a table.

    Args:
        title: Printed above the table.
        header: Column names. The first ``words`` columns hold names, the others numbers.
        rows: Cells, one per column.
        words: Number of left-aligned columns.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def for_terminal(self) -> RichTable:
        """Table for rich, one row per line. Cells are text, so that brackets are not markup."""
        title = Text(_clean(self.title), style="bold")
        table = RichTable(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim")
        for place, name in enumerate(self.header):
            numeric = place >= self.words  # a narrow terminal cuts names, never numbers
            least = None if numeric else min(10, max([len(name), *(len(row[place]) for row in self.rows)]))
            justify: Literal["left", "right"] = "right" if numeric else "left"
            table.add_column(Text(_clean(name)), justify=justify, no_wrap=numeric, min_width=least)
        for row in self.rows:
            table.add_row(*(Text(_clean(cell), no_wrap=True, overflow="ellipsis") for cell in row))
        return table

    def markdown(self) -> str:
        """Markdown for TensorBoard."""
        return markdown_table(self.header, [[_clean(cell) for cell in row] for row in self.rows])


def benchmark_table(result: EvaluationResult, title: str) -> Table:
    """One row per benchmark, and one for their mean."""
    labels = _labels([each.numbers for each in result.benchmarks] + [result.mean])
    rows = [[each.name, *_cells(each.numbers, labels)] for each in result.benchmarks]
    if result.mean:
        rows.append([MEAN, *_cells(result.mean, labels)])
    return Table(title, ["benchmark", *map(_heading, labels)], rows)


def breakdown_table(result: EvaluationResult) -> Table | None:
    """One row per part of each benchmark; None if nothing is broken down."""
    parts = [
        ([each.name, field, value], numbers)
        for each in result.benchmarks
        for field, values in each.breakdown.items()
        for value, numbers in values.items()
    ]
    if not parts:
        return None
    labels = _labels([numbers for _, numbers in parts])
    rows = [[*names, *_cells(numbers, labels)] for names, numbers in parts[:SHOWN_PARTS]]
    if len(parts) > SHOWN_PARTS:
        rows.append([f"and {len(parts) - SHOWN_PARTS} more in results.json", *[""] * (2 + len(labels))])
    return Table("by part", ["benchmark", "by", "value", *map(_heading, labels)], rows, words=3)


def change_table(first: Mapping[str, float], last: Mapping[str, float]) -> Table:
    """Accuracies at the first and the last evaluation of a run, from their metrics."""
    before, after = by_benchmark(first), by_benchmark(last)
    labels = [label for label in _labels(after.values()) if label == "greedy" or label.startswith(("avg", "pass"))]
    rows = [
        [name, *map(_change, _cells(before.get(name, {}), labels), _cells(numbers, labels))]
        for name, numbers in after.items()
    ]
    title = f"first and last evaluation, after iterations {first['iteration']:.0f} and {last['iteration']:.0f}"
    return Table(title, ["benchmark", *map(_heading, labels)], rows)


def _labels(numbers: Iterable[Numbers]) -> list[str]:
    """Labels that get a column, in the order of the columns; failures only if there are any."""
    numbers = list(numbers)
    found = {label for each in numbers for label in each} - {"seconds"}
    if not any(each.get("grading_failures") for each in numbers):
        found.discard("grading_failures")
    return sorted(found, key=_rank)


FIXED = {"problems": 0, "greedy": 1, "avg": 2, "response_tokens": 5, "truncated_frac": 6, "grading_failures": 7}


def _rank(label: str) -> tuple[int, int, str]:
    kind, _, k = label.partition("_at_")
    return FIXED.get(label, 3 if kind == "avg" else 4), int(k) if k.isdigit() else 0, label


def _heading(label: str) -> str:
    short = {"response_tokens": "tokens", "truncated_frac": "truncated", "grading_failures": "failures"}
    return short.get(label, label.replace("_at_", "@"))


def _form(label: str) -> str:
    forms = {"problems": "{:,.0f}", "response_tokens": "{:,.1f}", "truncated_frac": "{:.1%}"}
    return forms.get(label, "{:,.0f}" if label == "grading_failures" else "{:.3f}")


def _cells(numbers: Numbers, labels: Sequence[str]) -> list[str]:
    return [_form(label).format(numbers[label]) if label in numbers else "" for label in labels]


def _change(before: str, after: str) -> str:
    return f"{before} -> {after}" if before and after else after


def _clean(text: str) -> str:
    """Puts a text on one line, cuts it, and replaces what would move a cursor or not encode."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
