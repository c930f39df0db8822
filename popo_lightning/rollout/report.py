"""Statistics of an iteration's rollouts, and their total cost so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from popo_lightning.core.groups import Group


@dataclass
class RolloutReport:
    """Fresh groups of one iteration, and the groups it trains on.

    Args:
        version: Policy version of the iteration.
        effective_key: Reward component that decides "effective".
    """

    version: int
    effective_key: str
    fresh: list[Group] = field(default_factory=list)
    trained: list[Group] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)  # ages of the replayed groups
    gaps: dict[str, float] = field(default_factory=dict)  # engine and trainer compared, if data.behave is trainer
    critic_only: set[int] = field(default_factory=set)  # ids of fresh groups that the policy does not train on

    def sampled(self, groups: Sequence[Group]) -> None:
        """Adds groups the engine has just sampled."""
        self.fresh.extend(groups)

    def compared(self, gaps: dict[str, float]) -> None:
        """Adds the difference of engine and trainer on groups just sampled, see :func:`scored_by_trainer`."""
        self.gaps = of_all_ranks([self.gaps, gaps])

    def composed(self, groups: Sequence[Group]) -> None:
        """Records the composed groups. Those not sampled in this iteration are replayed."""
        sampled = {group.id for group in self.fresh}
        self.critic_only = {group.id for group in groups if group.critic_only}
        self.trained = [group for group in groups if not group.critic_only]
        self.ages = [self.version - group.version for group in self.trained if group.id not in sampled]

    def counts(self) -> dict[str, float]:
        """Returns counts, which :func:`of_all_ranks` combines over ranks.

        Responses for a critic alone count only as sampled, because other policies wrote their beginning.
        """
        fresh = [group for group in self.fresh if group.id not in self.critic_only]
        further = [r for group in self.fresh if group.id in self.critic_only for r in group.responses]
        responses = [response for group in fresh for response in group.responses]
        names = sorted({name for response in responses for name in response.parts})
        return {f"reward/{name}": sum(r.parts.get(name, 0.0) for r in responses) for name in names} | {
            "responses": len(responses) + len(further),
            "tokens": sum(len(response.token_ids) for response in [*responses, *further]),
            "continued_responses": len(further),
            "continued_tokens": sum(len(response.token_ids) for response in further),
            "truncated": sum(response.finish_reason == "length" for response in responses),
            "failures": sum(response.failure is not None for response in responses),
            "groups": len(fresh),
            "effective_groups": sum(group.is_effective(self.effective_key) for group in fresh),
            "all_wrong_groups": sum(float(group.rewards("acc").max()) <= 0 for group in fresh),
            "replayed_groups": len(self.ages),
            "age": sum(self.ages),
            "age_max": max(self.ages, default=0),
            "trained_groups": len(self.trained),
            **self.gaps,
        }


COUNTS = ("_groups", "_responses", "_problems", "_prefixes")  # ends of the names of a composer's counts
MAXIMA = ("age_max", "generate_seconds", "gap_max")  # all other counts are sums


def of_all_ranks(counts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combines the counts of one iteration over its ranks."""
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: (max if name in MAXIMA else sum)(each.get(name, 0.0) for each in counts) for name in names}


def composer_metrics(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combines what the composers of all ranks report of one iteration.

    A number whose name ends as in COUNTS is the sum over ranks. Any other is the plain mean over the ranks that have
    it; nan if none has.
    """
    found = {}
    for name in dict.fromkeys(name for each in reports for name in each):
        values = [each[name] for each in reports if not math.isnan(each.get(name, math.nan))]
        total = math.fsum(values)
        found[name] = total if name.endswith(COUNTS) else total / len(values) if values else math.nan
    return found


def rollout_metrics(counts: dict[str, float]) -> dict[str, float]:
    """Returns means over the iteration, by the names of docs/metrics.md.

    `throughput/generated_tokens_per_second` is the number of response tokens sampled on all ranks divided by the
    seconds that the slowest rank generated. Prompt tokens do not count, nor seconds of grading or of weight syncs. With
    data.async_level 1 the seconds are those in the background.

    Args:
        counts: Counts over all ranks; generate_seconds may be missing.
    """
    replayed = counts["replayed_groups"]
    found = {
        "replay/groups": float(replayed),
        "replay/share": replayed / max(1, counts["trained_groups"]),
        "replay/age_mean": counts["age"] / replayed if replayed else math.nan,
        "replay/age_max": float(counts["age_max"]) if replayed else math.nan,
        "replay/trained_groups": float(counts["trained_groups"]),
    }
    if not counts["groups"]:  # a composer may train on what earlier iterations sampled
        return found
    if tokens := counts.get("gap_tokens"):  # else the training steps compare engine and trainer
        found |= {"engine/logp_gap_mean": counts["gap"] / tokens, "engine/logp_gap_max": counts["gap_max"]}
    if seconds := counts.get("generate_seconds"):
        found["throughput/generated_tokens_per_second"] = counts["tokens"] / seconds
    responses = counts["responses"] - counts.get("continued_responses", 0)
    tokens = counts["tokens"] - counts.get("continued_tokens", 0)
    found |= {name: value / responses for name, value in counts.items() if name.startswith("reward/")}
    return found | {
        "rollout/effective_share": counts["effective_groups"] / counts["groups"],
        "rollout/all_wrong_share": counts["all_wrong_groups"] / counts["groups"],
        "rollout/truncated_frac": counts["truncated"] / responses,
        "rollout/response_tokens": tokens / responses,
        "rollout/grading_failures": float(counts["failures"]),
    }


@dataclass
class Totals:
    """Counts since the run began, over ranks and resumptions."""

    responses: int = 0
    tokens: int = 0
    groups: int = 0
    effective_groups: int = 0
    replayed_groups: int = 0
    trained_groups: int = 0
    continued_responses: int = 0  # responses for a critic alone, included in `responses`

    def add(self, counts: dict[str, float]) -> None:
        """Adds an iteration."""
        for name, value in asdict(self).items():
            setattr(self, name, value + int(counts[name]))

    @property
    def dynamic_sampling_responses(self) -> float:
        """Responses that dynamic sampling would have needed for as many full batches of effective groups.

        The estimate is responses / f at this run's own effective share f (2503.14476 samples until a batch is full). It
        leaves out responses for a critic alone.
        """
        responses = self.responses - self.continued_responses
        return responses * self.groups / self.effective_groups if self.effective_groups else math.inf

    def metrics(self) -> dict[str, float]:
        """Returns the running totals, by the names of docs/metrics.md."""
        return {
            "total/responses": float(self.responses),
            "total/tokens": float(self.tokens),
            "total/dynamic_sampling_responses": self.dynamic_sampling_responses,
        }
