"""Draws the plots of scripts/gpu_check.py: one for each part that measured something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30


def draw(found: dict[str, Any], out: Path) -> dict[str, str]:
    """Draws the plots of all parts with results.

    Args:
        found: Content of gpu_check.json.
        out: Folder of the plots.

    Returns:
        For each part whose plot could not be drawn, the reason.
    """
    import matplotlib

    matplotlib.use("Agg")
    kinds: dict[str, Callable[[dict[str, Any], str, Path], None]] = {
        "trainer": draw_trainer,
        "countdown": draw_countdown,
        "memory": draw_memory,
        "claims": draw_claims,
    }
    failures = {}
    for name, make in kinds.items():
        part = found["parts"].get(name, {})
        if part.get("numbers"):
            try:
                make(part, found["card"] or "CPU", out / f"{name}.png")
            except Exception as error:  # a failed plot must not lose the numbers
                failures[name] = f"{type(error).__name__}: {error}"
    return failures


def draw_trainer(part: dict[str, Any], card: str, out: Path) -> None:
    """Plots tokens per second and peak memory of each setting beside the published figures."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    numbers = part["numbers"]
    published = [(f"prime-rl {name}, 1 x H100", numbers["published"][name]) for name in ("64k", "16k")]
    measured = [(p["point"], p) for p in numbers["points"] if "tokens_per_second" in p]
    bars = [*published, *reversed(measured)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(bars) + 1.8), sharey=True)
    colors = ["0.6"] * len(published) + ["C0"] * len(measured)
    for axis, name, label in (
        (axes[0], "tokens_per_second", "tokens per second"),
        (axes[1], "peak_gib", "peak memory, GiB"),
    ):
        values = [bar[name] or 0 for _, bar in bars]
        drawn = axis.barh([name for name, _ in bars], values, color=colors)
        axis.bar_label(drawn, [written(bar, name) for _, bar in bars], padding=3)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_xlabel(label)
        axis.set_xlim(0, max(values) * 1.7 or 1)
        axis.grid(axis="x", alpha=0.3)
    layers = numbers["shape"]["num_hidden_layers"]
    figure.suptitle(f"A training step, {layers} layers of width {numbers['shape']['hidden_size']}, bf16-mixed, {card}")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def written(bar: dict[str, Any], name: str) -> str:
    """Label beside a bar."""
    if bar[name] is None:
        return "not measured"
    if name == "peak_gib":
        return f"{bar[name]:.1f}"
    return f"{bar[name]:,.0f}" + (f"  (MFU {bar['mfu']:.1%})" if bar["mfu"] else "")


def draw_countdown(part: dict[str, Any], card: str, out: Path) -> None:
    """Plots held-out accuracy and training reward by iteration, and seconds per iteration."""
    import matplotlib.pyplot as plt

    curve, evaluations = part["curve"], part["numbers"]["evaluations"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    axes[0].plot(curve["step"], curve["reward/score"], color="0.7", label="train, mean reward")
    for label, kind in (("avg@4", "avg_at_4"), ("greedy", "greedy")):
        points = [(e["iteration"], v) for e in evaluations for k, v in e.items() if k.endswith(f"countdown/{kind}")]
        axes[0].plot(*zip(*points, strict=True), marker="o", label=f"held out, {label}")
    axes[0].set_ylabel("accuracy")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    axes[1].plot(curve["step"], curve["time/iteration"], color="C2")
    axes[1].set_ylabel("seconds per iteration")
    axes[1].set_ylim(
        bottom=0, top=2.5 * sorted(curve["time/iteration"])[len(curve["step"]) // 2]
    )  # the first may stand out
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    figure.suptitle(f"Embedded Countdown by POPO, transformers engine, {card}")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_memory(part: dict[str, Any], card: str, out: Path) -> None:
    """Draws a plot like benchmarks/memory.png."""
    from bench_memory import plot

    plot(part["numbers"], out)


def draw_claims(part: dict[str, Any], card: str, out: Path) -> None:
    """Plots held-out avg@4 by iteration and by sampled responses: each run thin, each method's mean thick."""
    import matplotlib.pyplot as plt

    runs = part["numbers"].get("finished", [])
    if not runs:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for place, method in enumerate(sorted({run["method"] for run in runs})):
        curves = [evaluations(run) for run in runs if run["method"] == method]
        for axis, scale in ((axes[0], "iteration"), (axes[1], "responses")):
            lines = [[(point[scale], point["avg"]) for point in curve] for curve in curves]
            for line in lines:
                axis.plot(*zip(*line, strict=True), color=f"C{place}", alpha=0.25, linewidth=0.8)
            mean = [
                tuple(sum(values) / len(values) for values in zip(*points, strict=True))
                for points in zip(*lines, strict=True)
            ]
            axis.plot(*zip(*mean, strict=True), color=f"C{place}", marker="o", label=f"{method} ({len(curves)} seeds)")
            axis.set_xlabel("iteration" if scale == "iteration" else "responses sampled")
            axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out avg@4")
    axes[0].legend(fontsize=8)
    parameters = part["numbers"]["policy"]["parameters"]
    figure.suptitle(f"Countdown of three and four numbers, {parameters / 1e6:.1f}M parameters, {card}")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def evaluations(run: dict[str, Any]) -> list[dict[str, float]]:
    """Accuracy with the number of iterations and of responses before it, spread evenly over the run."""
    found = []
    for each in run["evaluations"]:
        avg = next(v for k, v in each.items() if "/avg_at_" in k)
        share = each["iteration"] / run["iterations"]
        found.append({"iteration": each["iteration"], "responses": share * run["responses"], "avg": avg})
    return found
