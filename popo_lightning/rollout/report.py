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
    ages: list[int] = field(default_factory=list)  # of the replayed groups

    def sampled(self, groups: Sequence[Group]) -> None:
        """Adds groups the engine has just sampled."""
        self.fresh.extend(groups)

    def composed(self, groups: Sequence[Group]) -> None:
        """Notes what the composer made of them: what was not sampled in this iteration is replayed."""
        sampled = {group.id for group in self.fresh}
        self.trained = list(groups)
        self.ages = [self.version - group.version for group in groups if group.id not in sampled]

    def counts(self) -> dict[str, float]:
        """Sums, of which those of several ranks may be added up."""
        responses = [response for group in self.fresh for response in group.responses]
        parts = sorted({part for response in responses for part in response.parts})
        return {f"reward/{part}": sum(r.parts.get(part, 0.0) for r in responses) for part in parts} | {
            "responses": len(responses),
            "tokens": sum(len(response.token_ids) for response in responses),
            "truncated": sum(response.finish_reason == "length" for response in responses),
            "failures": sum(response.failure is not None for response in responses),
            "groups": len(self.fresh),
            "effective_groups": sum(group.is_effective(self.effective_key) for group in self.fresh),
            "all_wrong_groups": sum(float(group.rewards("acc").max()) <= 0 for group in self.fresh),
            "replayed_groups": len(self.ages),
            "age": sum(self.ages),
            "age_max": max(self.ages, default=0),
            "trained_groups": len(self.trained),
        }


MAXIMA = ("age_max", "generate_seconds")  # all other counts are sums


def of_all_ranks(counts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The counts of one iteration, over its ranks."""
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: (max if name in MAXIMA else sum)(each.get(name, 0.0) for each in counts) for name in names}


def rollout_metrics(counts: dict[str, float]) -> dict[str, float]:
    """Means over the iteration, by the names of the README's table.

    `throughput/generated_tokens_per_second`: response tokens that were sampled on all ranks, over the seconds in which
    the slowest rank generated. Not those of prompts, and no seconds of grading or of weight syncs; with
    data.async_level 1 the seconds are those in the background.

    Args:
        counts: Of all ranks; generate_seconds may be missing.
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
    if seconds := counts.get("generate_seconds"):
        found["throughput/generated_tokens_per_second"] = counts["tokens"] / seconds
    rewards = {name: value / counts["responses"] for name, value in counts.items() if name.startswith("reward/")}
    return (
        found
        | rewards
        | {
            "rollout/effective_share": counts["effective_groups"] / counts["groups"],
            "rollout/all_wrong_share": counts["all_wrong_groups"] / counts["groups"],
            "rollout/truncated_frac": counts["truncated"] / counts["responses"],
            "rollout/response_tokens": counts["tokens"] / counts["responses"],
            "rollout/grading_failures": float(counts["failures"]),
        }
    )


@dataclass
class Totals:
    """Counts since the run began, over ranks and resumptions."""

    responses: int = 0
    tokens: int = 0
    groups: int = 0
    effective_groups: int = 0
    replayed_groups: int = 0
    trained_groups: int = 0

    def add(self, counts: dict[str, float]) -> None:
        """Adds an iteration."""
        for name, value in asdict(self).items():
            setattr(self, name, value + int(counts[name]))

    @property
    def dynamic_sampling_responses(self) -> float:
        """Responses that dynamic sampling would have needed for as many full batches of effective groups.

        An estimate at this run's own effective share f: responses / f (2503.14476 samples until a batch is full).
        """
        return self.responses * self.groups / self.effective_groups if self.effective_groups else math.inf

    def metrics(self) -> dict[str, float]:
        """Running totals, by the names of the README's table."""
        return {
            "total/responses": float(self.responses),
            "total/tokens": float(self.tokens),
            "total/dynamic_sampling_responses": self.dynamic_sampling_responses,
        }

    def state_dict(self) -> dict[str, int]:
        """Plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)
