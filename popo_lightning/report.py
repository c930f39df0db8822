"""What an iteration's rollouts were like, and what all of them have cost so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from popo_lightning.groups import Group


@dataclass
class RolloutReport:
    """Fresh groups of one iteration, and the groups it trains on.

    Args:
        version: Policy version that sampled.
        effective_by: Reward part that decides "effective".
    """

    version: int
    effective_by: str
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

    @property
    def effective(self) -> int:
        """Effective groups among the fresh ones."""
        return sum(group.is_effective(self.effective_by) for group in self.fresh)

    def metrics(self) -> dict[str, float]:
        """Means over the iteration, by the names of the README's table."""
        return self._rollout_metrics() | {
            "replay/groups": float(len(self.ages)),
            "replay/share": len(self.ages) / max(1, len(self.trained)),
            "replay/age_mean": sum(self.ages) / len(self.ages) if self.ages else math.nan,
            "replay/age_max": float(max(self.ages)) if self.ages else math.nan,
            "replay/trained_groups": float(len(self.trained)),
        }

    def _rollout_metrics(self) -> dict[str, float]:
        if not self.fresh:  # a composer may train on what earlier iterations sampled
            return {}
        responses = [response for group in self.fresh for response in group.responses]
        parts = sorted({part for response in responses for part in response.parts})
        found = {f"reward/{part}": sum(r.parts.get(part, 0.0) for r in responses) / len(responses) for part in parts}
        failures = sum(response.failure is not None for response in responses)
        wrong = sum(float(group.rewards("acc").max()) <= 0 for group in self.fresh)
        return found | {
            "rollout/effective_share": self.effective / len(self.fresh),
            "rollout/all_wrong_share": wrong / len(self.fresh),
            "rollout/truncated_share": sum(r.finish_reason == "length" for r in responses) / len(responses),
            "rollout/response_tokens": sum(len(r.token_ids) for r in responses) / len(responses),
            "rollout/grading_failures": float(failures),
        }


@dataclass
class Totals:
    """Counts since the run began, over resumptions."""

    responses: int = 0
    tokens: int = 0
    groups: int = 0
    effective_groups: int = 0
    replayed_groups: int = 0
    trained_groups: int = 0

    def add(self, report: RolloutReport) -> None:
        """Adds an iteration."""
        self.responses += sum(len(group.responses) for group in report.fresh)
        self.tokens += sum(group.tokens for group in report.fresh)
        self.groups += len(report.fresh)
        self.effective_groups += report.effective
        self.replayed_groups += len(report.ages)
        self.trained_groups += len(report.trained)

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
