"""The settings of each benchmark: the evaluation's own, overridden for single benchmarks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem

MEAN = "mean"
"""Stands for all benchmarks in metric names."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """Overrides for one benchmark; null uses the evaluation's own setting.

    Args:
        samples: Sampled responses per problem; 0 evaluates greedily only.
        avg_k: k of avg@k, at most samples.
        pass_k: k of pass@k, one or several values, each at most samples.
        greedy: Also generate the greedy response of each problem.
        temperature: Sampling temperature.
        top_p: Nucleus sampling probability mass.
        top_k: Number of most likely tokens to sample from; 0 means all.
        max_new_tokens: Response limit in tokens.
        limit: Maximum number of problems; 0 means all.
    """

    samples: int | None = None
    avg_k: int | None = None
    pass_k: int | list[int] | None = None
    greedy: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class EvalSettings:
    """All settings of one benchmark's evaluation, except the seed. The fields are those of BenchmarkSettings."""

    samples: int
    avg_k: int
    pass_k: tuple[int, ...]
    greedy: bool
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int | None
    limit: int

    def changed(self, settings: BenchmarkSettings) -> EvalSettings:
        """These settings, changed by one benchmark's own."""
        own = {name: value for name, value in vars(settings).items() if value is not None}
        if "pass_k" in own:
            own["pass_k"] = several(own["pass_k"])
        return replace(self, **own)

    def check(self, place: str) -> None:
        """Refuses settings that evaluate nothing or cannot be used.

        Args:
            place: Name of the settings, "evaluation" or "evaluation.benchmarks.NAME".
        """
        at_least(f"{place}.samples", self.samples, 0, ", which is greedy only")
        if not self.samples and not self.greedy:
            raise SettingError(f"{place}.samples is 0 and {place}.greedy false, which evaluates nothing; set either")
        ks = {"avg_k": (self.avg_k,), "pass_k": self.pass_k}
        wrong = {
            name: k for name, k in ks.items() if self.samples and not (k and all(1 <= one <= self.samples for one in k))
        }
        if wrong:
            given = " and ".join(f"{place}.{name} is {', '.join(map(str, k)) or 'empty'}" for name, k in wrong.items())
            fitting = " ".join(f"--{place}.{name} {self.samples}" for name in wrong)
            raise SettingError(
                f"{given}, but {place}.samples is {self.samples}; use k from 1 to samples, such as {fitting}, or more "
                "samples"
            )
        at_least(f"{place}.temperature", self.temperature, 0, ", which is greedy")
        if not 0 < self.top_p <= 1:
            raise SettingError(f"{place}.top_p is {self.top_p}; use a share above 0 and at most 1")
        at_least(f"{place}.top_k", self.top_k, 0, ", which takes all tokens")
        if self.max_new_tokens is not None:
            at_least(f"{place}.max_new_tokens", self.max_new_tokens, 1)
        at_least(f"{place}.limit", self.limit, 0, ", which takes all problems")

    @property
    def labels(self) -> list[str]:
        """Labels of the accuracies that are measured, such as greedy and pass_at_8."""
        sampled = [f"avg_at_{self.avg_k}", *(f"pass_at_{k}" for k in self.pass_k)] if self.samples else []
        return ["greedy"] * self.greedy + sampled

    def chosen(self, problems: Sequence[Problem]) -> Sequence[Problem]:
        """At most ``limit`` problems, chosen by :func:`a_part`."""
        return a_part(problems, self.limit) if self.limit else problems


def a_part(problems: Sequence[Problem], most: int) -> Sequence[Problem]:
    """At most `most` problems in their order. The choice is random, since files are often sorted, but fixed.

    A smaller `most` chooses a subset of what a larger one chooses.
    """
    if len(problems) <= most:
        return problems
    places = list(range(len(problems)))
    random.Random("evaluation/limit").shuffle(places)
    return [problems[place] for place in sorted(places[:most])]


def checked_number_kept(problems: int, write_samples: bool) -> int:
    """Checks evaluation.keep_responses.

    Args:
        problems: Setting evaluation.keep_responses.
        write_samples: Setting evaluation.write_samples; the responses are written to its files.

    Raises:
        SettingError: The number is below 0, or no files are written.
    """
    at_least("evaluation.keep_responses", problems, 0, ", which writes no tokens")
    if problems and not write_samples:
        raise SettingError(
            f"evaluation.keep_responses is {problems}, but evaluation.write_samples false writes no responses; set it "
            "to true"
        )
    return problems


def several(k: int | Sequence[int]) -> tuple[int, ...]:
    """One k or several as a tuple, each once, ascending."""
    return (k,) if isinstance(k, int) else tuple(sorted(set(k)))


def metric_names(settings_by_name: Mapping[str, EvalSettings]) -> list[str]:
    """Names of the metrics of an evaluation, given the settings of each benchmark."""
    always = ("response_tokens", "truncated_frac", "grading_failures", "seconds")
    found = [f"eval/{name}/{label}" for name, its in settings_by_name.items() for label in (*its.labels, *always)]
    return found + [f"eval/{MEAN}/{label}" for label in mean_labels(list(settings_by_name.values()))]


def mean_labels(settings: Sequence[EvalSettings]) -> list[str]:
    """Labels of the means over two or more benchmarks: the accuracies that all of them have.

    If their k of avg@k differ, "avg" is the mean of each benchmark's own.
    """
    if len(settings) < 2:
        return []
    found = [label for label in settings[0].labels if all(label in each.labels for each in settings)]
    differ = len({each.avg_k for each in settings}) > 1
    return [*found, "avg"] if differ and all(each.samples for each in settings) else found


def check_names(
    benchmarks: Mapping[str, Sequence[Problem]], named: Mapping[str, BenchmarkSettings], breakdown: Sequence[str]
) -> None:
    """Refuses settings for benchmarks and fields that the task does not have.

    Args:
        benchmarks: Problems by benchmark, as the task gives them.
        named: Setting evaluation.benchmarks.
        breakdown: Setting evaluation.breakdown.
    """
    there = ", ".join(benchmarks) or "none"
    for name in named:
        if name not in benchmarks:
            raise SettingError(f"evaluation.benchmarks names '{name}', which data.task does not have; there is {there}")
    if MEAN in benchmarks and len(benchmarks) > 1:
        raise SettingError(
            f"a benchmark of data.task is called '{MEAN}', the name of the mean over all of them; rename it"
        )
    known = {field for problems in benchmarks.values() for problem in problems for field in problem.info}
    for field in set(breakdown) - set(DEFAULT_BREAKDOWN) - known:
        raise SettingError(
            f"evaluation.breakdown names '{field}', which no held-out problem of data.task has; they have "
            + (", ".join(sorted(known)) or "nothing to break down by")
        )


DEFAULT_BREAKDOWN = ("level", "subject")
"""Default fields of a breakdown. A field that the task lacks is left out silently."""


def seed_of_draws(seed: int, rank: int, benchmark: str, iteration: int | None) -> int:
    """Seed of one rank's draws for a benchmark.

    Args:
        seed: Setting evaluation.seed.
        rank: The rank.
        benchmark: Name of the benchmark. With one seed for all, any two would share the noise of their first problems.
        iteration: Iteration that is evaluated; None if all iterations have the same draws.
    """
    place = f"evaluation/{seed}/{rank}/{benchmark}"
    return random.Random(place if iteration is None else f"{place}/{iteration}").getrandbits(62)
