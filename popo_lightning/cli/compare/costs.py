"""Tables of the runs' costs, groups and weights."""

from __future__ import annotations

import math

from popo_lightning.cli.compare.collection import Collection, Number, total
from popo_lightning.cli.compare.curves import AT_THE_END
from popo_lightning.cli.compare.statistics import interval, paired_ratio
from popo_lightning.cli.compare.tables import NONE, SECONDS_NOTE, Section, extent_cell, extent_note, spread
from popo_lightning.evaluation.tables import Table

PHASES = ("generate", "verify", "compose", "prox", "train", "sync", "other", "evaluation")
SHOWN_AGES = 10


def cost_section(found: Collection) -> Section:
    """Responses, tokens and seconds of whole runs."""
    dynamic = found.comparison.dynamic_sampling
    rows = []
    for arm, seeds in found.arms.items():
        if dynamic is None:
            theirs = found.numbers(arm, total("dynamic_sampling_responses"))
        else:
            theirs = found.numbers(found.reference(arm, dynamic), total("responses"))
        relative = spread(paired_ratio(found.numbers(arm, total("responses")), theirs), "{:.2f}")
        totals = [
            extent_cell(found, arm, total(name), "{:,.0f}")
            for name in ("responses", "tokens", "seconds", "wall_seconds")
        ]
        iterations = "/".join(f"{n:.0f}" for n in sorted({run.totals["iterations"] for run in seeds.values()}))
        rows.append([arm.label, iterations, totals[0], relative, *totals[1:]])
    header = [
        "method",
        "iterations",
        "responses",
        f"of {dynamic}'s" if dynamic else "of dynamic sampling's (estimate)",
        "tokens trained",
        "seconds",
        "with evaluation",
    ]
    notes = [
        "Responses are all that were generated for training, discarded ones included.",
        SECONDS_NOTE,
        *extent_note(found),
    ]
    if dynamic is None:
        notes.append("Dynamic sampling's responses are estimated: a run's own, divided by its effective share.")
    return Section(Table("What a run costs", header, rows), notes)


def health_section(found: Collection) -> Section:
    """Numbers about the runs' groups, weights and policy."""
    columns = {
        "effective share": ("effective_share", "{:.1%}"),
        "replayed share": ("replay_share", "{:.1%}"),
        "mean age": ("age_mean", "{:.2f}"),
        "clip share": ("clip_frac", "{:.2%}"),
        "entropy at the end": ("entropy_end", "{:.3f}"),
    }
    rows = []
    for arm in found.arms:
        largest = max(found.numbers(arm, _health("weight_max")).values(), default=None)
        cells = [extent_cell(found, arm, _health(name), form) for name, form in columns.values()]
        rows.append([arm.label, *cells, NONE if largest is None else f"{largest:.2f}"])
    notes = [
        f"Means over iterations, then over seeds; the entropy is that of the last {AT_THE_END} iterations, the weight "
        "the largest raw one of any replayed token of any seed.",
        *extent_note(found),
    ]
    return Section(Table("Groups, weights and policy", ["method", *columns, "largest weight"], rows), notes)


def age_section(found: Collection) -> Section | None:
    """Effective sample size of the weights by age of the replayed groups."""
    ages = sorted({age for run in found.runs for age in run.ess_by_age})
    if not ages:
        return None
    rows = [
        [arm.label, *(extent_cell(found, arm, _ess(age), "{:.3f}") for age in ages[:SHOWN_AGES])]
        for arm, seeds in found.arms.items()
        if any(run.ess_by_age for run in seeds.values())
    ]
    header = ["method", *(f"age {age}" for age in ages[:SHOWN_AGES])]
    notes = [
        "Share of replayed tokens that their raw weights are worth; means over iterations that replayed that age.",
        *extent_note(found),
    ]
    if len(ages) > SHOWN_AGES:
        notes.append(f"Ages up to {ages[-1]} were replayed; the first {SHOWN_AGES} are shown.")
    return Section(Table("Effective sample size by age", header, rows), notes)


def phase_section(found: Collection) -> Section:
    """Seconds of a run by phase."""
    names = [name for name in PHASES if any(name in run.phases for run in found.runs)]
    names += sorted({name for run in found.runs for name in run.phases} - {*PHASES, "iteration"})
    rows = [
        [arm.label, *(f"{interval([run.phases.get(name, 0.0) for run in seeds.values()]).mean:.1f}" for name in names)]
        for arm, seeds in found.arms.items()
    ]
    note = "Means over seeds, of a whole run; they depend on the machine and on what else ran on it."
    return Section(Table("Seconds by phase", ["method", *names], rows), [note])


def _health(name: str) -> Number:
    return lambda run: run.health[name]


def _ess(age: int) -> Number:
    return lambda run: run.ess_by_age.get(age, math.nan)
