"""Numbers of an evaluation: per benchmark, per level, subject and other fields, and over all benchmarks."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.ranks import all_gather_object, all_reduce
from popo_lightning.evaluation.benchmarks import MEAN, EvalSettings, mean_labels
from popo_lightning.grading.pool import GradingPool, check_grades
from popo_lightning.metrics.estimates import AvgAtK, PassAtK

Numbers = dict[str, float]
"""problems, greedy, avg_at_K, pass_at_K, response_tokens, truncated_frac, grading_failures."""

MAX_PARTS = 100  # a field with more values is not broken down

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of one benchmark over all ranks.

    Args:
        name: Name of the benchmark.
        settings: Settings of the evaluation.
        numbers: Metrics of the whole benchmark.
        breakdown: Metrics by field of ``Problem.info`` and by value. Fields with a single value are left out.
        seconds: Time of weight sync, generation and grading on this rank.
    """

    name: str
    settings: EvalSettings
    numbers: Numbers
    breakdown: dict[str, dict[str, Numbers]]
    seconds: float


@dataclass(frozen=True)
class EvaluationResult:
    """Results of all benchmarks with the same weights.

    Args:
        iteration: Number of rollout iterations the weights were trained for.
        benchmarks: Results in the task's order.
    """

    iteration: int
    benchmarks: Sequence[BenchmarkResult]

    @property
    def mean(self) -> Numbers:
        """Unweighted means over two or more benchmarks, by :func:`mean_labels`."""
        means = {}
        for label in mean_labels([each.settings for each in self.benchmarks]):
            own = [f"avg_at_{each.settings.avg_k}" if label == "avg" else label for each in self.benchmarks]
            values = [each.numbers[its] for each, its in zip(self.benchmarks, own, strict=True)]
            means[label] = sum(values) / len(values)
        return means

    def metrics(self) -> Numbers:
        """Flat metrics under the names that loggers use, without the breakdown, which may have hundreds."""
        metrics: Numbers = {}
        for each in self.benchmarks:
            metrics |= {f"eval/{each.name}/{k}": v for k, v in each.numbers.items() if k != "problems"}
            metrics[f"eval/{each.name}/seconds"] = each.seconds
        return metrics | {f"eval/{MEAN}/{label}": value for label, value in self.mean.items()}

    def to_plain(self) -> dict[str, Any]:
        """All results, for results.json."""
        benchmarks = {}
        for each in self.benchmarks:
            plain = asdict(each)
            benchmarks[plain.pop("name")] = plain
        return {"iteration": self.iteration, "benchmarks": benchmarks, "mean": self.mean}


def by_benchmark(entry: Mapping[str, float]) -> dict[str, Numbers]:
    """Splits flat metrics into the numbers of each benchmark, by label. The mean over all counts as a benchmark."""
    found: dict[str, Numbers] = {}
    for key, value in entry.items():
        if key.startswith("eval/"):
            name, label = key.removeprefix("eval/").rsplit("/", 1)
            found.setdefault(name, {})[label] = value
    return found


def measured(
    trainer: L.Trainer,
    name: str,
    settings: EvalSettings,
    problems: Sequence[Problem],
    greedy: Sequence[Group],
    sampled: Sequence[Group],
    fields: Sequence[str],
    seconds: float,
) -> BenchmarkResult:
    """Computes the numbers of a benchmark and of its parts.

    Args:
        trainer: Trainer of this rank.
        name: Name of the benchmark.
        settings: Settings of the evaluation.
        problems: Problems of all ranks, so that every rank adds up the same parts in the same order.
        greedy: This rank's greedy responses, one per group; empty without them.
        sampled: This rank's sampled responses; empty without them.
        fields: Fields of ``Problem.info`` to break down by.
        seconds: Seconds that the evaluation took.
    """
    breakdown = {}
    for field in fields:
        mine = [value_of(problem, field) for problem in problems[trainer.global_rank :: trainer.world_size]]
        values = in_order(value_of(problem, field) for problem in problems)
        if len(values) > MAX_PARTS:
            log.warning("benchmark '%s' has %d values of '%s' and is not broken down by it", name, len(values), field)
        elif len(values) > 1:
            breakdown[field] = {
                value: _numbers(trainer, settings, _part(greedy, mine, value), _part(sampled, mine, value))
                for value in values
            }
    return BenchmarkResult(name, settings, _numbers(trainer, settings, greedy, sampled), breakdown, seconds)


def check_graded(result: BenchmarkResult, pool: GradingPool) -> None:
    """Stops all ranks if the verifier failed for every response to a benchmark, whose numbers would mean nothing.

    Args:
        result: Result of the benchmark over all ranks.
        pool: This rank's graders, which know their first failure.

    Raises:
        SettingError: Every grading failed; the message has the reason.
    """
    responses = result.numbers["problems"] * (result.settings.samples + result.settings.greedy)
    failures = result.numbers["grading_failures"]
    if failures == responses:  # on all ranks or none, since the rest is a collective
        counts = {"responses": responses, "failures": failures}
        check_grades(counts, all_gather_object(pool.first_failure), f"to benchmark '{result.name}'")


NO_VALUE = "(none)"


def value_of(problem: Problem, field: str) -> str:
    """A field of ``Problem.info`` as text, which names a part of a breakdown."""
    value = problem.info.get(field)
    if value is None:
        return NO_VALUE
    return value if isinstance(value, str) else json.dumps(value, default=str)


def in_order(values: Iterable[str]) -> list[str]:
    """Each value once: numbers by size, then words, then NO_VALUE."""

    def key(value: str) -> tuple[int, float, str]:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):  # every rank must get the same order, and nan has none
            return 0, number, value
        return 2 if value == NO_VALUE else 1, 0.0, value

    return sorted(set(values), key=key)


def _part(groups: Sequence[Group], values: Sequence[str], value: str) -> list[Group]:
    return [group for group, its in zip(groups, values, strict=True) if its == value] if groups else []


def _numbers(trainer: L.Trainer, settings: EvalSettings, greedy: Sequence[Group], sampled: Sequence[Group]) -> Numbers:
    """Numbers over all ranks, some of which may have no group of this part."""
    device = trainer.strategy.root_device
    either = sampled if settings.samples else greedy
    numbers = {"problems": _sum_over_ranks(trainer, torch.ones(len(either)))}
    if settings.greedy:
        numbers["greedy"] = _mean_over_ranks(trainer, _correct(greedy, 1)[:, 0])
    if settings.samples:
        correct = _correct(sampled, settings.samples).to(device)
        metrics: list[tuple[str, AvgAtK | PassAtK]] = [(f"avg_at_{settings.avg_k}", AvgAtK(settings.avg_k))]
        metrics += [(f"pass_at_{k}", PassAtK(k)) for k in settings.pass_k]
        for label, metric in metrics:
            metric.to(device).update(correct)
            numbers[label] = float(metric.compute())
    responses = [response for group in either for response in group.responses]
    numbers["response_tokens"] = _mean_over_ranks(trainer, _each(len(r.token_ids) for r in responses))
    numbers["truncated_frac"] = _mean_over_ranks(trainer, _each(r.finish_reason == "length" for r in responses))
    graded: list[Response] = [response for group in (*greedy, *sampled) for response in group.responses]
    numbers["grading_failures"] = _sum_over_ranks(trainer, _each(r.failure is not None for r in graded))
    return numbers


def _correct(groups: Sequence[Group], n: int) -> Tensor:
    """(problems, n) accuracies."""
    return torch.stack([group.rewards("acc") for group in groups]) if groups else torch.zeros(0, n)


def _each(values: Iterable[float]) -> Tensor:
    return torch.tensor([float(value) for value in values])


def _sum_over_ranks(trainer: L.Trainer, values: Tensor) -> float:
    return all_reduce(trainer, float(values.double().sum()), "sum")


def _mean_over_ranks(trainer: L.Trainer, values: Tensor) -> float:
    """Mean over the values of all ranks, which may have different numbers of them."""
    return _sum_over_ranks(trainer, values) / _sum_over_ranks(trainer, torch.ones(len(values)))
