"""Plots curves of one or more runs: training reward and effective share, and every number of every benchmark.

Usage: python scripts/plot_runs.py OUT.png RUN_FOLDER...
Runs of one method share a color. Reads metrics.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curve = tuple[list[float], list[float]]
TRAINING = ("reward/acc", "reward/score", "rollout/effective_share")
LEFT_OUT = ("seconds", "grading_failures")


def read(folder: Path) -> dict[str, Curve]:
    """Reads (iterations, values) by metric name."""
    curves: dict[str, Curve] = defaultdict(lambda: ([], []))
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and (name in TRAINING or name.startswith("eval/")):
                    curves[name][0].append(float(row["step"]))
                    curves[name][1].append(float(value))
    return dict(curves)


def smoothed(values: list[float], width: int) -> list[float]:
    """Mean over a window that ends at each value, because rewards of small batches are noisy."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def main(out: Path, folders: list[Path]) -> None:
    """Draws one panel per metric."""
    runs = {folder: read(folder) for folder in folders}
    names = sorted({name for run in runs.values() for name in run}, key=lambda name: (name.startswith("eval/"), name))
    names = [name for name in names if not name.endswith(LEFT_OUT)]
    if not names:
        sys.exit(f"plot_runs: no metrics.csv below {', '.join(map(str, folders))} has a row to draw")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, sharex=True)
    methods = sorted({folder.name.split("-seed")[0] for folder in folders})
    for axis, name in zip(axes.flat, names, strict=False):
        for folder, run in runs.items():
            if name not in run:
                continue
            steps, values = run[name]
            color = f"C{methods.index(folder.name.split('-seed')[0])}"
            if name.startswith("eval/"):
                axis.plot(steps, values, marker="o", markersize=3, color=color, label=folder.name)
            else:
                axis.plot(steps, values, color=color, alpha=0.2)
                axis.plot(steps, smoothed(values, 10), color=color, label=f"{folder.name}, mean of 10")
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("rollout iterations")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    main(options.out, options.runs)
