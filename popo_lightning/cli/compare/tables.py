"""Tables of accuracy: final accuracy, difference to another method, and accuracy at the swept settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from popo_lightning.cli.compare.collection import Collection, Number
from popo_lightning.cli.compare.plan import Arm
from popo_lightning.cli.compare.statistics import Interval, extent
from popo_lightning.evaluation.tables import Table

NONE = "–"
SECONDS_NOTE = (
    "Seconds are of training, without evaluations and the start of processes; they depend on the machine, and can be "
    "compared only if nothing else ran on it."
)


@dataclass(frozen=True)
class Section:
    """A table with the notes needed to read it.

    Args:
        table: The table.
        notes: Sentences under its title.
    """

    table: Table
    notes: Sequence[str] = ()


def spread(found: Interval, form: str = "{:.3f}") -> str:
    """Formats a mean with its interval."""
    if not found.n:
        return NONE
    mean, low, high = (form.format(value) for value in (found.mean, found.low, found.high))
    return mean if math.isnan(found.low) or low == mean == high else f"{mean} [{low}, {high}]"


def accuracy_section(found: Collection) -> Section:
    """Final accuracy of each arm."""
    metrics = found.measured()
    rows = [
        [arm.label, str(len(seeds)), *(spread(found.accuracy(arm, metric)) for metric in metrics)]
        for arm, seeds in found.arms.items()
    ]
    header = ["method", "seeds", *map(found.metric_name, metrics)]
    return Section(Table("Final accuracy", header, rows), [_final_note(found)])


def difference_section(found: Collection, method: str) -> Section | None:
    """Final accuracy minus another method's at the same seed."""
    metrics = found.measured()
    rows = []
    for arm in found.arms:
        reference = found.reference(arm, method)
        if reference not in found.arms or reference == arm:
            continue
        by_metric = [found.difference(arm, reference, metric) for metric in metrics]
        pairs = str(max((each.n for each in by_metric), default=0))
        rows.append([arm.label, pairs, *(spread(each, "{:+.3f}") for each in by_metric)])
    if not rows:
        return None
    header = ["method", "pairs", *map(found.metric_name, metrics)]
    note = f"Each seed's final accuracy minus that of {method} at the same seed (and sweep label), then their mean."
    return Section(Table(f"Difference to {method}", header, rows), [note])


def sweep_section(found: Collection) -> Section | None:
    """Metric by method and sweep label, with differences to the baseline."""
    comparison = found.comparison
    if not comparison.sweep:
        return None
    labels, metric, baseline = list(comparison.sweep), comparison.metric, comparison.baseline
    best = {method: found.best_label(method, metric) for method in comparison.methods}
    rows = []
    for method in comparison.methods:
        arms = [Arm(method, label) for label in labels]
        cells = [spread(found.accuracy(arm, metric)) for arm in arms]
        rows.append([method, *cells, best[method] or NONE])
        if baseline is None or method == baseline:
            continue
        apart = [found.difference(arm, found.reference(arm, baseline), metric) for arm in arms]
        ours, theirs = Arm(method, best[method] or ""), Arm(baseline, best[baseline] or "")
        cells = [spread(each, "{:+.3f}") for each in (*apart, found.difference(ours, theirs, metric))]
        rows.append([f"{method} - {baseline}", *cells])
    notes = [
        "Differences are seed by seed at the same label; in the last column each method is at its own best one.",
        "A best label is chosen on these same evaluations and seeds, and is so flattered by chance.",
    ]
    header = ["method", *labels, "best"]
    return Section(Table(f"Sweep: final {found.metric_name(metric)}", header, rows), notes)


def _final_note(found: Collection) -> str:
    count = found.comparison.final_evaluations
    short = sum(len([p for p in run.points if p.iteration > 0]) < count for run in found.runs)
    what = "the last evaluation" if count == 1 else f"the last {count} evaluations"
    fewer = f" ({short} of {len(found.runs)} runs have fewer)" if short else ""
    return f"Mean of {what} of a run after training began{fewer}, then mean over seeds."


def extent_note(found: Collection) -> list[str]:
    """Says what brackets mean in a table of `extent_cell`; empty if there are none."""
    several = any(len(seeds) > 1 for seeds in found.arms.values())
    return ["Brackets are the least and the largest seed."] if several else []


def extent_cell(found: Collection, arm: Arm, number: Number, form: str) -> str:
    """Formats the mean of a number over an arm's seeds, with the minimum and maximum."""
    return spread(extent(list(found.numbers(arm, number).values())), form)
