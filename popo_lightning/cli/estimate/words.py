"""Lines that `popo estimate` prints, and numbers that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from popo_lightning.cli.estimate.bootstrap import Estimated
from popo_lightning.cli.estimate.instrument import Effect
from popo_lightning.cli.estimate.judgment import SAMPLED, Judgment
from popo_lightning.cli.estimate.logged import LoggedBenchmark
from popo_lightning.cli.export.visible_text import visible


def judgment_lines(found: Judgment, benchmark: LoggedBenchmark, temperature: float) -> list[str]:
    """A heading, and a table of estimates.

    Args:
        found: Estimates.
        benchmark: Benchmark whose responses were used.
        temperature: Temperature at which the checkpoint is judged.
    """
    heading = (
        f"{visible(benchmark.name)} at temperature {temperature:g}: {found.responses} responses to {found.problems} "
        f"problems, sampled after iteration {', '.join(map(str, benchmark.iterations))} at {benchmark.temperature:g}; "
        f"{found.effective.mean():.2f} of {found.responses / found.problems:.3g} responses a problem are effective, "
        f"{found.share_unusable:.0%} of the problems are not usable, the mean weight is {found.mean_weight:.3f}"
    )
    rows = [["estimator", "value", "95% interval", "change", "95% interval"]]
    rows.append([SAMPLED, *_cells(found.sampled), "", ""])
    rows += [[name, *_cells(value), *_cells(found.changes[name], "+")] for name, value in found.estimates.items()]
    return [heading, *_columns(rows), ""]


def refusal(found: Judgment, benchmark: LoggedBenchmark) -> str:
    """Says why nothing is estimated, and what to do."""
    return (
        f"{found.share_unusable:.0%} of the {found.problems} problems of benchmark '{visible(benchmark.name)}' have "
        f"fewer than 2 effective responses (on average {found.effective.mean():.2f} of "
        f"{found.responses / found.problems:.3g}) or a mean weight below 0.5, too few to estimate anything; take the "
        "responses of a closer checkpoint by --from or --iteration, more responses a problem, or evaluate"
    )


def effect_lines(found: Effect, instrument: str, action: str, reward: str) -> list[str]:
    """A heading, and a table of the effect.

    Args:
        found: The effect.
        instrument: Name of the hint.
        action: Expression of the behavior.
        reward: Name of the reward component.
    """
    heading = (
        f"{found.responses} responses to {found.problems} problems; {action} holds for {found.p11:.3f} of those with "
        f"{instrument} and for {found.p10:.3f} of those without"
    )
    named = {
        f"mean {reward} if always": found.always,
        f"mean {reward} if never": found.never,
        "effect (Wald ratio)": found.wald,
        "naive difference": found.naive,
    }
    rows = [["", "value", "95% interval"], *([name, *_cells(value)] for name, value in named.items())]
    return [heading, *_columns(rows)]


def plain(found: Judgment, benchmark: LoggedBenchmark, temperature: float) -> dict[str, Any]:
    """All numbers, for a file; without estimates if these are refused."""
    return {
        "iterations": list(benchmark.iterations),
        "temperature": temperature,
        "sampled_at": benchmark.temperature,
        "problems": found.problems,
        "responses": found.responses,
        "refused": found.refused,
        "effective": dict(zip((group.problem.id for group in benchmark.groups), found.effective.tolist(), strict=True)),
        "share_unusable": found.share_unusable,
        "mean_weight": found.mean_weight,
        "sampled": asdict(found.sampled),
        "estimates": {name: asdict(value) for name, value in found.estimates.items()},
        "changes": {name: asdict(value) for name, value in found.changes.items()},
    }


def _cells(found: Estimated, sign: str = "") -> list[str]:
    return [f"{found.value:{sign}.3f}", f"[{found.low:{sign}.3f}, {found.high:{sign}.3f}]"]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
