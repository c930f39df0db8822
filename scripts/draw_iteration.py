"""Draws the README's picture of one iteration: `python scripts/draw_iteration.py` writes docs/images/iteration.png."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "iteration.png"
INK, PAPER, EDGE = "#1f2933", "#ffffff", "#52606d"
RIGHT, WRONG, MIXED, STORED = "#c7e8d2", "#f6cfcf", "#fbe7b2", "#cfe0fb"
BOXES = {  # name: (x, y, width, height, color, text)
    "prompts": (0.0, 3.3, 1.7, 1.0, PAPER, "prompts"),
    "engine": (2.3, 3.3, 1.8, 1.0, PAPER, "engine\n(vLLM)"),
    "grader": (5.4, 3.3, 1.8, 1.0, PAPER, "verifier"),
    "right": (8.2, 4.2, 3.0, 0.62, RIGHT, "all right: no gradient"),
    "wrong": (8.2, 3.49, 3.0, 0.62, WRONG, "all wrong: no gradient"),
    "mixed": (8.2, 2.78, 3.0, 0.62, MIXED, "mixed: effective"),
    "buffer": (8.2, 1.05, 3.0, 0.95, STORED, "buffer: the most recent\neffective groups"),
    "batch": (12.9, 2.65, 3.0, 1.5, PAPER, "minibatch: fresh and\nreplayed groups"),
    "policy": (12.9, 0.45, 3.0, 1.4, PAPER, "policy step\nweight prox / behave,\nclip policy / prox"),
}
ARROWS = [  # from, to, side, side
    ("prompts", "engine", "right", "left"),
    ("engine", "grader", "right", "left"),
    ("grader", "right", "right", "left"),
    ("grader", "wrong", "right", "left"),
    ("grader", "mixed", "right", "left"),
    ("mixed", "batch", "right", "left"),
    ("mixed", "buffer", "bottom", "top"),
    ("buffer", "batch", "right", "left"),
    ("batch", "policy", "bottom", "top"),
]


def side(name: str, where: str) -> tuple[float, float]:
    """Middle of a box's side."""
    x, y, width, height, *_ = BOXES[name]
    points = {"left": (x, y + height / 2), "right": (x + width, y + height / 2)}
    points |= {"top": (x + width / 2, y + height), "bottom": (x + width / 2, y)}
    return points[where]


def draw(out: Path = OUT) -> None:
    """Writes the picture.

    Args:
        out: PNG file.
    """
    figure, axes = plt.subplots(figsize=(12, 3.9), facecolor=PAPER)
    axes.set(xlim=(-0.1, 16.0), ylim=(-0.05, 4.9))
    axes.axis("off")
    for x, y, width, height, color, text in BOXES.values():
        style = "round,pad=0.02,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=EDGE, lw=1.2))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=INK)
    for start, end, out_side, in_side in ARROWS:
        arrow(axes, side(start, out_side), side(end, in_side))
    for x, y, text in (
        (4.75, 4.5, "K responses\nto each"),
        (10.05, 2.35, "kept"),
        (12.1, 1.15, "fill the places\nof the others"),
        (8.0, 0.42, "new weights"),
    ):
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color=EDGE)
    (x, y), (engine, below) = side("policy", "left"), side("engine", "bottom")
    axes.plot([x, engine], [y - 0.5, y - 0.5], color=EDGE, lw=1.3)
    arrow(axes, (engine, y - 0.5), (engine, below))
    figure.savefig(out, dpi=150, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    plt.close(figure)


def arrow(axes: plt.Axes, a: tuple[float, float], b: tuple[float, float]) -> None:
    """Draws an arrow from one point to another."""
    axes.add_patch(FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=13, color=EDGE, lw=1.3, shrinkA=0))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw()
