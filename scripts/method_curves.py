"""Draws the curve on each page of docs/methods, of a method and GRPO, from the curves.csv of a comparison.

Usage: python scripts/method_curves.py COMPARISON_FOLDER [METHOD...]
Writes docs/methods/curves/METHOD.png, one panel for each held-out number, and the page's section "Curve".
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGES = Path(__file__).parent.parent / "docs" / "methods"
BASELINE = "grpo"
PANELS = {"avg_at_k": "avg@4", "greedy": "greedy accuracy", "pass_at_k": "pass@4"}

Points = dict[int, list[float]]  # values of all seeds by iteration


def read(folder: Path) -> tuple[dict[str, dict[str, Points]], set[str]]:
    """Reads (values by method and number, seeds)."""
    curves: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    seeds = set()
    with (folder / "curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            seeds.add(row["seed"])
            for number in PANELS:
                if row[number]:
                    curves[row["method"]][number][int(float(row["iteration"]))].append(float(row[number]))
    return curves, seeds


def draw(method: str, curves: dict[str, dict[str, Points]], path: Path) -> None:
    """Draws one panel per number: means over seeds of the method, and of the baseline in gray behind it."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 2.6), sharex=True)
    for axis, (number, title) in zip(axes, PANELS.items(), strict=True):
        for name, color in ((BASELINE, "0.65"), (method, "C0")):
            points = sorted(curves[name][number].items())
            means = [sum(values) / len(values) for _, values in points]
            axis.plot([iteration for iteration, _ in points], means, marker="o", markersize=3, color=color, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("rollout iterations", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_section(method: str, seeds: int) -> None:
    """Adds or replaces the page's section, before "Where it deviates"."""
    page = PAGES / f"{method}.md"
    text = re.sub(r"## Curve\n.*?(?=\n## |\Z)", "", page.read_text(), flags=re.DOTALL)
    many = "one seed, which shows only that it learns" if seeds == 1 else f"mean of {seeds} seeds"
    section = (
        f"## Curve\n\n![held-out accuracy of {method} and {BASELINE}](curves/{method}.png)\n\n"
        f"Embedded Countdown, 500 held-out problems, learning rate 1e-4, {many}; GRPO in gray.\n\n"
    )
    place = text.index("## Where it deviates")
    page.write_text(text[:place] + section + text[place:])


def main(folder: Path, wanted: list[str]) -> None:
    """Draws all methods, or those named on the command line."""
    curves, seeds = read(folder)
    (PAGES / "curves").mkdir(exist_ok=True)
    for method in wanted or sorted(curves):
        draw(method, curves, PAGES / "curves" / f"{method}.png")
        write_section(method, len(seeds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder with curves.csv")
    parser.add_argument("methods", nargs="*", help="default: all but grpo")
    options = parser.parse_args()
    main(options.comparison, options.methods)
