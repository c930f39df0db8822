"""The figures of a comparison. Matplotlib is imported when they are drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from popo_lightning.cli.compare.collection import Collection
from popo_lightning.cli.compare.curves import AXES, RunResult
from popo_lightning.cli.compare.plan import Arm
from popo_lightning.cli.compare.statistics import Interval, extent
from popo_lightning.core.errors import SettingError

# Okabe and Ito's colors, distinct to color-blind readers. Black comes last; yellow is too light for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")
AXIS_NAMES = {
    "iteration": "rollout iterations",
    "responses": "responses generated, discarded ones included",
    "seconds": "seconds of training (evaluation left out)",
    "tokens": "response tokens trained on",
}
WINDOW = 10
MIN_SEEDS = 3  # an interval of two seeds is about twenty times as wide as their range and would dwarf the rest


def check_plots() -> None:
    """Raises before the first run if drawing would fail after the last.

    Raises:
        SettingError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError(
            "plots is true, but matplotlib is not installed; install popo_lightning[plot], or set plots to false"
        )


def draw(found: Collection) -> dict[str, str]:
    """Draws all figures that the runs allow into the comparison's folder.

    Returns:
        Captions by file name.
    """
    name = found.metric_name(found.comparison.metric)
    drawn: dict[str, tuple[Any, str]] = {}
    for label in found.comparison.variants():
        arms = [arm for arm in found.arms if arm.sweep == label]
        suffix, at_label = (f"-{label}", f" at {label}") if label else ("", "")
        if any(run.curve(found.comparison.metric) for arm in arms for run in found.arms[arm].values()):
            drawn[f"curves{suffix}.png"] = (
                curves(found, arms, f"{name}{at_label}"),
                f"{name}{at_label}: means over seeds, shaded from the least to the largest. A point lies at its "
                "evaluation's mean place on the horizontal axis.",
            )
    if drawn:
        drawn["final.png"] = (
            final_accuracies(found),
            f"Final accuracy: means, 95% t intervals of {MIN_SEEDS} seeds or more, and single seeds as small dots.",
        )
    if found.comparison.sweep and drawn:
        beside = ", and its difference to the baseline at the same label" if _has_others(found) else ""
        drawn["sweep.png"] = (sweep(found), f"Final {name} by sweep label{beside}.")
    if any(run.effective for run in found.runs):
        caption = f"Effective share of fresh groups, mean over seeds and the last {WINDOW} iterations."
        drawn["effective.png"] = (effective_share(found), caption)
    found.comparison.folder.mkdir(parents=True, exist_ok=True)
    for file, (figure, _) in drawn.items():
        figure.savefig(found.comparison.folder / file, dpi=120)
    return {file: caption for file, (_, caption) in drawn.items()}


def curves(found: Collection, arms: Sequence[Arm], title: str) -> Any:
    """Plots the metric against each of the four things that a run spends."""
    figure, axes = _figure(2, 2, (11, 7.5))
    metric = found.comparison.metric
    for axis, spent in zip(axes.flat, AXES, strict=True):
        for arm in arms:
            runs = [run.curve(metric) for run in found.arms[arm].values() if run.curve(metric)]
            shared = sorted(set.intersection(*({point.iteration for point in run} for run in runs))) if runs else []
            if not shared:
                continue
            kept = [[point for point in run if point.iteration in shared] for run in runs]
            values = [extent([run[i].numbers[metric] for run in kept]) for i in range(len(shared))]
            places = [extent([getattr(run[i], spent) for run in kept]).mean for i in range(len(shared))]
            style = _style(found, arm)
            axis.plot(places, [each.mean for each in values], markersize=4, linewidth=1.6, **style)
            if len(runs) > 1:
                low, high = [each.low for each in values], [each.high for each in values]
                axis.fill_between(places, low, high, color=style["color"], alpha=0.5 / max(4, len(arms)), linewidth=0)
        axis.set_xlabel(AXIS_NAMES[spent])
        axis.ticklabel_format(axis="x", style="plain")
        axis.xaxis.set_major_locator(_few_ticks())
        if spent in ("responses", "tokens"):
            axis.xaxis.set_major_formatter("{x:,.0f}")
    for row in axes:
        row[0].set_ylabel(title)
    return _with_legend(figure, found, arms)


def final_accuracies(found: Collection) -> Any:
    """Plots final accuracies: one row per arm, one panel per metric."""
    metrics = found.measured()
    arms = list(found.arms)
    figure, axes = _figure(1, len(metrics), (1.6 + 3.2 * len(metrics), 1.2 + 0.36 * len(arms)), sharey=True)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for row, arm in enumerate(arms):
            values = list(found.numbers(arm, found.final(metric)).values())
            _point(axis, found.accuracy(arm, metric), row, _style(found, arm), across=True)
            axis.plot(values, [row + 0.25] * len(values), "o", color=_style(found, arm)["color"], markersize=2.5)
        axis.set_xlabel(f"final {found.metric_name(metric)}")
        axis.xaxis.set_major_locator(_few_ticks())
    axes[0][0].set_yticks(range(len(arms)), [arm.label for arm in arms])
    axes[0][0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def sweep(found: Collection) -> Any:
    """Plots the metric by sweep label, and its difference to the baseline."""
    comparison, metric, baseline = found.comparison, found.comparison.metric, found.comparison.baseline
    panels: dict[str, Callable[[Arm], Interval]] = {
        f"final {found.metric_name(metric)}": lambda arm: found.accuracy(arm, metric)
    }
    if _has_others(found):
        panels[f"difference to {baseline}"] = lambda arm: found.difference(arm, found.reference(arm, baseline), metric)
    labels, methods = list(comparison.variants()), list(comparison.methods)
    figure, axes = _figure(1, len(panels), (1.5 + 4.6 * len(panels), 4.2))
    for axis, (title, number) in zip(axes[0], panels.items(), strict=True):
        for place, method in enumerate(methods):
            if "difference" in title and method == baseline:
                continue
            beside = 0.5 * ((place + 0.5) / len(methods) - 0.5)
            for at, label in enumerate(labels):
                _point(axis, number(Arm(method, label)), at + beside, _style(found, Arm(method, label)), across=False)
        axis.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 4 else 0)
        axis.set_xlim(-0.5, len(labels) - 0.5)
        axis.set_ylabel(title)
        if "difference" in title:
            axis.axhline(0, color="#777777", linewidth=1)
    return _with_legend(figure, found, list(found.arms))


def _has_others(found: Collection) -> bool:
    """Whether there is a baseline, and a method to compare with it."""
    return found.comparison.baseline is not None and len(found.comparison.methods) > 1


def effective_share(found: Collection) -> Any:
    """Plots the effective share over iterations, smoothed."""
    labels = list(found.comparison.variants())
    figure, axes = _figure(1, len(labels), (2.5 + 4.8 * len(labels), 4), sharey=True)
    for axis, label in zip(axes[0], labels, strict=True):
        for arm in found.arms:
            if arm.sweep == label:
                iterations, shares = _mean_share(list(found.arms[arm].values()))
                style = _style(found, arm) | {"marker": "none"}
                axis.plot(iterations, shares, linewidth=1.6, **style)
        axis.set_xlabel("rollout iterations")
        axis.set_title(label)
    axes[0][0].set_ylabel("effective share of fresh groups")
    return _with_legend(figure, found, list(found.arms))


def _mean_share(runs: Sequence[RunResult]) -> tuple[list[int], list[float]]:
    """Iterations that all seeds have, and the mean over seeds and over a window that ends at each iteration."""
    series = [run.effective for run in runs]
    shared = sorted(set.intersection(*(set(each) for each in series)))
    means = [sum(each[i] for each in series) / len(series) for i in shared]
    smooth = [sum(means[max(0, i + 1 - WINDOW) : i + 1]) / min(i + 1, WINDOW) for i in range(len(means))]
    return shared, smooth


def _point(axis: Any, found: Interval, place: float, style: dict[str, str], across: bool) -> None:
    if not found.n:
        return
    error = [[max(0.0, found.mean - found.low)], [max(0.0, found.high - found.mean)]] if found.n >= MIN_SEEDS else None
    where = {"x": found.mean, "y": place, "xerr": error} if across else {"x": place, "y": found.mean, "yerr": error}
    marker = {"color": style["color"], "marker": style["marker"]}
    axis.errorbar(**where, **marker, linestyle="none", markersize=5, capsize=2.5, linewidth=1.4)


def _style(found: Collection, arm: Arm) -> dict[str, str]:
    """Style of a method, the same in every figure."""
    place = list(found.comparison.methods).index(arm.method)
    line = LINES[place // len(COLORS) % len(LINES)]
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)], "linestyle": line}


def _figure(rows: int, columns: int, size: tuple[float, float], sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no figure is displayed and no backend changes

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _with_legend(figure: Any, found: Collection, arms: Sequence[Arm]) -> Any:
    """Adds a legend beside the panels, with each method once."""
    from matplotlib.lines import Line2D

    styles = {arm.method: _style(found, arm) for arm in arms}
    ordered = [method for method in found.comparison.methods if method in styles]
    handles = [Line2D([], [], markersize=5, **styles[method]) for method in ordered]  # type: ignore[arg-type]
    figure.legend(handles, ordered, loc="outside right upper", frameon=False)
    return figure


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)
