"""What a run spends to reach the baseline's accuracy or a given one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from popo_lightning.cli.compare.collection import Collection, total
from popo_lightning.cli.compare.curves import RunResult
from popo_lightning.cli.compare.statistics import at, median_reached, reached_at
from popo_lightning.cli.compare.tables import NONE, SECONDS_NOTE, Section
from popo_lightning.evaluation.tables import Table


@dataclass(frozen=True)
class CostToTarget:
    """Cost until the target was reached.

    Args:
        iterations: Rollout iterations.
        responses: Responses generated for training.
        seconds: Training time.
        share: Iterations as a fraction of the baseline's whole run at the same seed; None without a baseline.
    """

    iterations: float
    responses: float
    seconds: float
    share: float | None


def accuracy_target(found: Collection, run: RunResult) -> float | None:
    """Accuracy that the run must reach: the given one, or the baseline's final one at the same seed and label."""
    comparison = found.comparison
    if comparison.target is not None:
        return comparison.target
    reference = found.reference(run.arm, comparison.baseline)
    return found.numbers(reference, found.final(comparison.metric)).get(run.seed)


def cost_to_target(found: Collection, run: RunResult) -> CostToTarget | None:
    """Cost until the run reached its target; None if it never did or has none."""
    wanted = accuracy_target(found, run)
    points = run.curve(found.comparison.metric)
    place = None if wanted is None else reached_at([point.numbers[found.comparison.metric] for point in points], wanted)
    if place is None:
        return None
    iterations, responses, seconds = (
        at([getattr(point, axis) for point in points], place) for axis in ("iteration", "responses", "seconds")
    )
    reference = found.reference(run.arm, found.comparison.baseline)
    theirs = found.numbers(reference, total("iterations")).get(run.seed)
    return CostToTarget(iterations, responses, seconds, iterations / theirs if theirs else None)


def target_section(found: Collection) -> Section | None:
    """Table of medians over seeds for each arm."""
    comparison = found.comparison
    if comparison.target is None and comparison.baseline is None:
        return None
    rows = []
    for arm, seeds in found.arms.items():
        baselines = found.seeds(found.reference(arm, comparison.baseline))
        tried = {
            seed: cost_to_target(found, run) for seed, run in seeds.items() if accuracy_target(found, run) is not None
        }
        against = [each for seed, each in tried.items() if seed in baselines]
        reached = sum(each is not None for each in tried.values())
        rows.append(
            [
                arm.label,
                f"{reached} of {len(tried)}",
                _middle(list(tried.values()), lambda each: each.iterations, "{:,.0f}"),
                _middle(against, lambda each: each.share or 0.0, "{:.0%}"),
                _middle(list(tried.values()), lambda each: each.responses, "{:,.0f}"),
                _middle(list(tried.values()), lambda each: each.seconds, "{:,.0f}"),
            ]
        )
    name = found.metric_name(comparison.metric)
    what = f"{comparison.baseline}'s final {name}" if comparison.target is None else f"{name} {comparison.target:g}"
    header = ["method", "reached", "iterations", f"of {comparison.baseline or 'baseline'}'s", "responses", "seconds"]
    notes = [
        f"Where each seed's own curve first comes to {what}{'' if comparison.target else ' of the same seed'}, on "
        "straight lines between evaluations; medians over seeds, in which a seed that never does counts as infinite.",
        "A noisy curve's first crossing is early for every method: the baseline's own row is what the others are to be "
        "read against.",
        SECONDS_NOTE,
    ]
    return Section(Table(f"To reach {what}", header, rows), notes)


def _middle(values: list[CostToTarget | None], number: Callable[[CostToTarget], float], form: str) -> str:
    if not values:
        return NONE
    middle = median_reached([None if each is None else number(each) for each in values])
    return form.format(middle) if math.isfinite(middle) else "not reached"
