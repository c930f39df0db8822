"""Makes the table and the plot at the end of scripts/demo.sh, of every run below a folder.

Usage: python scripts/demo_report.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

PHASES = ("generate", "verify", "prox", "train", "sync", "evaluation")

ONE_SEED = (
    "One seed decides nothing between two methods: the same seed gives other figures on another processor or number of "
    "threads, and other seeds differ as much. popo compare runs several."
)


def main(root: Path) -> None:
    """Prints the table and writes curves.png."""
    found = {path.parent: json.loads(path.read_text()) for path in sorted(root.rglob("summary.json"))}
    if not found:
        sys.exit(f"demo_report: no summary.json below {root}")
    runs = dict(sorted(found.items(), key=lambda item: (item[1]["method"], -item[1]["seed"]), reverse=True))
    console = Console(width=max(110, 40 + 18 * len(runs)), highlight=False)
    console.print(table(list(runs.values())))
    if len({summary["seed"] for summary in runs.values()}) == 1:
        console.print(ONE_SEED)
    plot(list(runs.values()), root / "curves.png")
    console.print(f"curves       {root / 'curves.png'}")
    for folder in runs:
        console.print(f"metrics      {folder / 'metrics.csv'}, samples.jsonl, summary.json, config.yaml")
    console.print(f"TensorBoard  .venv/bin/tensorboard --logdir {root}", soft_wrap=True)


def table(summaries: list[dict[str, Any]]) -> Table:
    """One column per run, with values before and after training where both are meaningful."""
    result = Table(title="Before and after training", title_justify="left")
    result.add_column("")
    for summary in summaries:
        result.add_column(f"{summary['method']}, seed {summary['seed']}", justify="right")

    def row(name: str, cells: list[str]) -> None:
        result.add_row(name, *cells)

    k, n = summaries[0]["last_evaluation"]["avg_k"], summaries[0]["last_evaluation"]["pass_k"]
    for label, key in (("greedy accuracy", "greedy"), (f"avg@{k}", "avg_at_k"), (f"pass@{n}", "pass_at_k")):
        cells = [(s["first_evaluation"][key], s["last_evaluation"][key]) for s in summaries]
        if all(number is not None for cell in cells for number in cell):
            row(label, [f"{before:.3f} -> {after:.3f}" for before, after in cells])
    row("iterations", [f"{s['iterations']}" for s in summaries])
    row("responses generated", [f"{s['responses']:,}" for s in summaries])
    row("  dynamic sampling would need about", [f"{s['dynamic_sampling_responses'] or 0:,}" for s in summaries])
    row("effective share of fresh groups", [f"{s['effective_share']:.0%}" for s in summaries])
    row("replayed share of trained groups", [f"{s['replay_share']:.0%}" for s in summaries])
    row("wall seconds", [f"{s['wall_seconds']:.0f}" for s in summaries])
    for phase in PHASES:
        row(f"  {phase}", [f"{s['seconds'].get(phase, 0.0):.0f}" for s in summaries])
    return result


def plot(summaries: list[dict[str, Any]], path: Path) -> None:
    """Plots avg@k and greedy accuracy against rollout iterations."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    colors: dict[str, str] = {}
    for axis, wanted in zip(axes, ("avg_at_", "greedy"), strict=True):
        shown: set[str] = set()
        for summary in summaries:
            method = summary["method"]
            colors.setdefault(method, f"C{len(colors)}")
            points = [(entry["iteration"], _value(entry, wanted)) for entry in summary["evaluations"]]
            label = None if method in shown else method
            shown.add(method)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colors[method], label=label)
        axis.set_title("greedy accuracy" if wanted == "greedy" else f"avg@{summaries[0]['last_evaluation']['avg_k']}")
        axis.set_xlabel("rollout iterations")
        axis.grid(alpha=0.3)
        axis.legend()
    seeds = ", ".join(str(seed) for seed in sorted({summary["seed"] for summary in summaries}))
    figure.suptitle(f"{summaries[0]['task']}, held-out problems, seed {seeds}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _value(entry: dict[str, float], wanted: str) -> float:
    """Value of one evaluation: the mean over benchmarks if there are several."""
    found = {key: value for key, value in entry.items() if key.rsplit("/", 1)[-1].startswith(wanted)}
    means = [value for key, value in found.items() if key.startswith("eval/mean/")]
    return (means or list(found.values()))[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    main(options.folder)
