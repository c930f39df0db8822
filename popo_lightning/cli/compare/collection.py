"""Collects the finished runs of a comparison and the planned ones that are missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from popo_lightning.cli.compare.curves import RunResult, read_run
from popo_lightning.cli.compare.plan import (
    RECORD,
    RUNS,
    SUMMARY,
    Arm,
    PlannedRun,
    difference_between,
    is_finished,
    planned_run,
    read_record,
)
from popo_lightning.cli.compare.settings import METRICS, Comparison, Metric
from popo_lightning.cli.compare.statistics import Interval, interval, paired

Number = Callable[[RunResult], float]


@dataclass
class Collection:
    """Runs that can be compared.

    Args:
        comparison: The settings of the comparison.
        arms: Runs by seed, for each arm in the order of the settings; arms without a run are left out.
        missing: Planned runs that have not finished.
        left_out: Folders of other runs below the root, with the reason.
        circumstances: Version, machine and threads of the runs, each once.
    """

    comparison: Comparison
    arms: dict[Arm, dict[int, RunResult]] = field(default_factory=dict)
    missing: list[PlannedRun] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    circumstances: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[RunResult]:
        """All runs."""
        return [run for seeds in self.arms.values() for run in seeds.values()]

    def seeds(self, arm: Arm | None) -> dict[int, RunResult]:
        """The runs of an arm by seed; empty for None, or for an arm without a run."""
        return {} if arm is None else self.arms.get(arm, {})

    def numbers(self, arm: Arm | None, number: Number) -> dict[int, float]:
        """A number of each run of an arm, by seed. Runs where it is NaN, which means none, are left out."""
        found = {seed: number(run) for seed, run in self.seeds(arm).items()}
        return {seed: value for seed, value in found.items() if value == value}

    def reference(self, arm: Arm, method: str | None) -> Arm | None:
        """The arm of the method that an arm is measured against, with the same sweep label."""
        return None if method is None else Arm(method, arm.sweep)

    def final(self, metric: str) -> Number:
        """Returns a function that gives a run's final accuracy."""
        return lambda run: run.final(metric, self.comparison.final_evaluations)

    def measured(self) -> list[Metric]:
        """The metrics that a run has."""
        return [metric for metric in METRICS if any(run.curve(metric) for run in self.runs)]

    def metric_name(self, metric: str) -> str:
        """Name of a metric in tables and on axes."""
        return metric_name(metric, self.runs)

    def best_label(self, method: str, metric: str) -> str | None:
        """The sweep label at which a method's mean final accuracy is highest."""
        found = {arm.sweep: self.accuracy(arm, metric) for arm in self.arms if arm.method == method}
        means = {label: accuracy.mean for label, accuracy in found.items() if accuracy.n}
        return max(means, key=lambda label: means[label]) if means else None

    def accuracy(self, arm: Arm, metric: str) -> Interval:
        """Final accuracy over an arm's seeds."""
        return interval(list(self.numbers(arm, self.final(metric)).values()))

    def difference(self, arm: Arm, reference: Arm | None, metric: str) -> Interval:
        """Final accuracy minus the reference's, over the seeds that both have."""
        return paired(self.numbers(arm, self.final(metric)), self.numbers(reference, self.final(metric)))


def metric_name(metric: str, runs: Sequence[RunResult]) -> str:
    """Name of a metric, such as avg@4, or avg@k if the runs have different k."""
    if metric == "greedy":
        return "greedy accuracy"
    kind = metric.partition("_")[0]
    ks = {run.ks.get(f"{kind}_k") for run in runs}
    return f"{kind}@{(ks.pop() if len(ks) == 1 else None) or 'k'}"


def total(name: str) -> Number:
    """Returns a function that gives a total of a run."""
    return lambda run: run.totals[name]


def collect(comparison: Comparison, planned: Sequence[PlannedRun]) -> Collection:
    """Reads the planned runs that are finished, and other seeds of the same arms that ran with equal settings.

    Raises:
        SettingError: A planned run's folder holds another run or damaged files.
    """
    found = Collection(comparison, {run.arm: {} for run in planned})
    for run in [*planned, *_others(found, planned)]:
        if not is_finished(run):
            found.missing.append(run)
            continue
        found.arms[run.arm][run.seed] = read_run(run.folder, run.arm, run.seed)
        record = read_record(run.folder) or {}
        told = [f"popo_lightning {record.get('version')}", f"torch {record.get('torch')}", str(record.get("machine"))]
        told.append(f"OMP_NUM_THREADS {record.get('threads')}")
        if (circumstance := ", ".join(told)) not in found.circumstances:
            found.circumstances.append(circumstance)
    found.arms = {arm: dict(sorted(seeds.items())) for arm, seeds in found.arms.items() if seeds}
    return found


def _others(collection: Collection, planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Finished runs below the root that are not planned, but would be with another list of seeds."""
    comparison, known, found = collection.comparison, {run.folder.resolve() for run in planned}, []
    for path in sorted((comparison.folder / RUNS).glob(f"*/{RECORD}")) + sorted(
        (comparison.folder / RUNS).glob(f"*/*/{RECORD}")
    ):
        folder = path.parent
        shown = os.path.relpath(folder, comparison.folder)  # the report may be read elsewhere
        if folder.resolve() in known:
            continue
        record = read_record(folder) or {}
        arm = Arm(str(record["method"]), str(record["sweep"]))
        if arm not in collection.arms:
            collection.left_out.append(f"{shown}: not among the methods and sweep labels asked for")
            continue
        wanted = planned_run(comparison, arm, int(record["seed"]))
        difference = difference_between(record, wanted.record())
        if difference is not None or wanted.folder.resolve() != folder.resolve():
            collection.left_out.append(f"{shown}: made with other settings ({difference or 'another place'})")
        elif not (folder / SUMMARY).exists():
            collection.left_out.append(f"{shown}: not finished")
        else:
            found.append(wanted)
    return found
