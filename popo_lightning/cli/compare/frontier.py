"""Report section on reuse: responses needed as a function of how often they are trained on, and the best setting."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from popo_lightning.cli.compare.collection import Collection
from popo_lightning.cli.compare.curves import RunResult
from popo_lightning.cli.compare.plan import Arm
from popo_lightning.cli.compare.reuse_law import Forecast, cheapest, fitted, forecast, needed_responses, rising
from popo_lightning.cli.compare.tables import NONE, SECONDS_NOTE, Section
from popo_lightning.evaluation.tables import Table

LEVELS = (0.5, 0.75, 1.0)  # fractions of the way from the highest first accuracy to the lowest last one
NEAR = 0.2  # relative error of a prediction that counts as near
ENOUGH = 0.6  # share of the seeds whose prediction must be near for a law to hold
# Log-probs of prox, critic values and a composer's passes are computed once an iteration, however often it trains.
GENERATING = ("generate", "verify", "compose", "sync", "wait", "prox", "values", "rescore")
TRAINING = ("train",)
HEADER = ["setting", "reuse", "responses needed", "cost of a run to it, seconds"]


@dataclass(frozen=True)
class Setting:
    """Costs of one sweep label of the method.

    Args:
        label: Sweep label.
        reuse: Sigma, the tokens trained on per token generated; mean over seeds.
        generated: Seconds per response generated, with grading, weight sync and all passes once an iteration.
        trained: Seconds per response trained on once.
        runs: Runs of the label.
    """

    label: str
    reuse: float
    generated: float
    trained: float
    runs: list[RunResult]

    def cost(self, needed: float) -> float:
        """Seconds of a run that generates so many responses."""
        return needed * (self.generated + self.trained * self.reuse)


def reuse_of(run: RunResult) -> float:
    """Tokens trained on per token generated; 1 if each response is trained on once."""
    return run.totals["tokens"] / run.totals["generated_tokens"]


def setting_of(label: str, runs: list[RunResult]) -> Setting:
    """Computes a label's reuse, and the costs of generation and training."""
    responses = [run.totals["responses"] for run in runs]
    sigma = [reuse_of(run) for run in runs]

    def price(phases: Sequence[str], counts: Sequence[float]) -> float:
        seconds = [sum(run.phases.get(phase, 0.0) for phase in phases) for run in runs]
        return fmean(s / count for s, count in zip(seconds, counts, strict=True))

    trained = [count * each for count, each in zip(responses, sigma, strict=True)]
    return Setting(label, fmean(sigma), price(GENERATING, responses), price(TRAINING, trained), runs)


def levels_reached(runs: Sequence[RunResult], metric: str) -> list[float]:
    """Accuracies that every run reaches, between the highest start and the lowest end of all curves."""
    curves = [rising([point.numbers[metric] for point in run.curve(metric)]) for run in runs]
    if not curves or not all(curves):
        return []
    start, end = max(curve[0] for curve in curves), min(curve[-1] for curve in curves)
    return [min(end, start + (end - start) * share) for share in LEVELS] if end > start else []


def needed_by(setting: Setting, metric: str, level: float) -> list[float]:
    """Responses that each seed generated to reach a level, which all runs reach."""
    found = []
    for run in setting.runs:
        curve = run.curve(metric)
        needed = needed_responses([p.numbers[metric] for p in curve], [p.responses for p in curve], level)
        assert needed is not None, "levels are those that every run reaches"
        found.append(needed)
    return found


def frontier_section(found: Collection) -> Section | None:
    """The law of the method in `frontier`, its prediction and the cheapest setting; None if `frontier` is null."""
    comparison = found.comparison
    if comparison.frontier is None:
        return None
    settings = []
    for label in comparison.variants():
        runs = list(found.seeds(Arm(comparison.frontier, label)).values())
        if runs and all(run.totals["generated_tokens"] for run in runs):
            settings.append(setting_of(label, runs))
    settings.sort(key=lambda each: each.reuse)
    name = found.metric_name(comparison.metric)
    title = f"Reuse of {comparison.frontier}: responses needed to reach {name}"
    levels = levels_reached([run for each in settings for run in each.runs], comparison.metric)
    if (reason := _no_law(settings, levels)) is not None:
        return Section(Table(title, HEADER, []), [reason])
    rows: list[list[str]] = []
    notes = [
        "Reuse is the number of tokens trained on per token generated. D(reuse) = floor + slope reuse^-exponent is "
        "fitted to the means over seeds (arXiv 2502.04327); brackets are 95% bootstrap intervals over seeds.",
        "Curves are made monotone first, and levels are accuracies that every run reaches.",
    ]
    for level in levels:
        rows += _rows(settings, comparison.metric, level)
        notes += _sentences(settings, comparison.metric, level, name)
    return Section(Table(title, ["level", *HEADER], rows), [*notes, SECONDS_NOTE])


def _no_law(settings: Sequence[Setting], levels: Sequence[float]) -> str | None:
    """Why no law can be fitted to settings, which are in order of reuse; None if one can."""
    if len({each.reuse for each in settings}) < 3:
        return "Fewer than three settings have finished, which determine no law."
    for one, other in itertools.pairwise(settings):
        if one.reuse == other.reuse:
            both = f"{one.label or NONE} and {other.label or NONE}"
            return f"{both} have the same reuse, which a law of reuse cannot tell apart; sweep data.ppo_epochs alone."
    return None if levels else "No accuracy is reached by every run, so that nothing is compared."


def _rows(settings: Sequence[Setting], metric: str, level: float) -> list[list[str]]:
    rows = []
    for each in settings:
        needed = fmean(needed_by(each, metric, level))
        cost = f"{each.cost(needed):,.0f}"
        rows.append([f"{level:.3f}", each.label or NONE, f"{each.reuse:.2f}", f"{needed:,.0f}", cost])
    return rows


def _sentences(settings: Sequence[Setting], metric: str, level: float, name: str) -> list[str]:
    """Sentences about the law at one level."""
    needed = {each.reuse: needed_by(each, metric, level) for each in settings}
    most = settings[-1].reuse
    ahead = forecast(needed, lambda law: law.responses(2 * most))
    if ahead.law is None:
        return [f"At {name} {level:.3f} no law of this form holds: more reuse does not save responses here."]
    law = ahead.law
    generated, trained = fmean(each.generated for each in settings), fmean(each.trained for each in settings)
    best = min(settings, key=lambda each: each.cost(fmean(needed[each.reuse])))
    at_best = cheapest(law, list(needed), generated, trained)
    found = [
        f"At {name} {level:.3f}: exponent {law.exponent:.2f}, floor {law.floor:,.0f} responses. A reuse of "
        f"{2 * most:.1f}, which was not run, would need {_cell(ahead)} responses. At {1000 * generated:.3g} ms per "
        f"response generated and {1000 * trained:.3g} ms per response trained on once, means over the settings, a "
        f"reuse of {at_best:.1f} costs least by the law. Of the settings that were run {best.label or NONE} cost least."
    ]
    if ahead.failed > 0.05:
        found.append(f"In {ahead.failed:.0%} of the resamples no law holds, so little is known of this one.")
    return found + _held_out(settings, needed, level, name)


def _held_out(settings: Sequence[Setting], needed: dict[float, list[float]], level: float, name: str) -> list[str]:
    """Says how far off a law is at the largest reuse if it is fitted without that reuse."""
    if len(needed) < 4:
        return []
    last = settings[-1]
    below = {reuse: values for reuse, values in needed.items() if reuse < last.reuse}
    told = forecast(below, lambda law: law.responses(last.reuse))
    if told.law is None:
        return [f"At {name} {level:.3f} the settings below {last.label} follow no law, so nothing was predicted of it."]
    truth = fmean(needed[last.reuse])
    return [
        f"At {name} {level:.3f} the settings below {last.label} predict {_cell(told)} responses for it; it needed "
        f"{truth:,.0f}, so the prediction is {told.value / truth - 1:+.0%} off. {_by_seed(settings, below, needed)}"
    ]


def _by_seed(settings: Sequence[Setting], below: dict[float, list[float]], needed: dict[float, list[float]]) -> str:
    """Says the same of each seed alone, if every setting has the same seeds."""
    seeds = [run.seed for run in settings[-1].runs]
    if any([run.seed for run in each.runs] != seeds for each in settings):
        return ""
    last, near = settings[-1].reuse, 0
    for place in range(len(seeds)):
        law = fitted(list(below), [values[place] for values in below.values()])
        near += law is not None and abs(law.responses(last) / needed[last][place] - 1) <= NEAR
    verdict = "so the law predicts a setting here" if near >= ENOUGH * len(seeds) else "so the law does not hold here"
    return f"Seed by seed it is within {NEAR:.0%} in {near} of {len(seeds)}, {verdict}."


def _cell(found: Forecast) -> str:
    return f"{found.value:,.0f} [{found.low:,.0f}, {found.high:,.0f}]"
