"""SPEAR: imitates the policy's own recent successes while they exceed its present level."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from popo_lightning.core.bounds import above, at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.objectives.advantages import group_normalized
from popo_lightning.replay.composer import Composer, Iteration


@dataclass(eq=False)
class SPEAR(Composer):
    """SPEAR's self-imitation (2509.22601; TencentYoutuResearch/SPEAR).

    Responses whose standardized advantage in their own group is above `threshold` (with 0, those better than their
    group's mean) are kept, up to `capacity` of them and up to `max_age` versions. Once `start` of them are stored, they
    are replayed together beside the fresh groups and leave the store. Their advantage is recomputed from what the
    policy reached before this iteration:

        A = reward - median of the last `baseline_groups` group-mean rewards,      only A > 0 is replayed,
        loss weight = coefficient * (1 - cos(pi * min(version, warm_up) / warm_up)) / 2,

    with the clip of pi_policy / pi_behave around 1 (trust region `BehaveAligned`, behave weight `NoCorrection`). An
    iteration's own group means join the others after its replay. All fresh groups are trained on unchanged. Stored:
    those responses with their prompts and behave log-probs, and the group means. Extra rollouts: none. Extra rows: the
    replayed ones, which are groups of 1 to K responses with fixed advantages.

    Deviations: the covariance clip of replayed tokens (0.02 of them), the tool-call bonus, and the base recipe's
    filters of groups and of responses are left out. The source's code differs in these points: it gives the replay
    optimizer steps of its own, and replays a random subset of the store whose size is a power of two; here replayed and
    fresh rows share steps and a denominator. Its trajectory_score_threshold of 1 is a setting that nothing reads. Its
    store must hold 1.5 * 2048 samples before a replay, where each turn of an agent is a sample; with one sample per
    response that many never gather within max_age, hence `start`.

    Args:
        capacity: Maximum number of stored responses; those of the oldest groups leave first.
        threshold: Responses with a greater standardized advantage are kept. The source uses 0. With 1 and rewards of 0
            and 1 these are the correct responses of groups with fewer than half correct.
        max_age: Maximum age of a replayed response in policy versions.
        start: Minimum number of stored responses for a replay.
        baseline_groups: Number of latest group-mean rewards whose median is the baseline.
        coefficient: Loss weight of the replayed responses after the warm-up.
        warm_up: Iterations over which that weight rises from 0; 0 starts with the full weight.
        reward_key: Reward component that is imitated; must be the one trained on (model.reward_key).
    """

    follows_reward = True
    fixes_advantages = True
    state = ("_kept", "_means")
    transient = ("_replayed",)

    capacity: int = 2048
    threshold: float = 0.0
    max_age: int = 10
    start: int = 64
    baseline_groups: int = 10240
    coefficient: float = 1.0
    warm_up: int = 200
    reward_key: str = "score"

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.capacity:
            raise SettingError(
                f"SPEAR.start is {self.start} and SPEAR.capacity {self.capacity}; never more are kept than the "
                "capacity, so use 1 <= start <= capacity"
            )
        at_least("SPEAR.threshold", self.threshold, 0, ", such as 0.0")
        at_least("SPEAR.max_age", self.max_age, 1, ", the age of the newest replay")
        at_least("SPEAR.baseline_groups", self.baseline_groups, 1, ", which a median needs")
        above("SPEAR.coefficient", self.coefficient, 0, "1.0")
        at_least("SPEAR.warm_up", self.warm_up, 0, " iterations")
        self._means: deque[float] = deque(maxlen=self.baseline_groups)
        self._kept: list[Group] = []  # oldest first; each has only the responses that are kept
        self._replayed = 0  # responses replayed in the last iteration

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns all fresh groups, then replayed responses once enough are stored."""
        fresh = iteration.rollout()
        replayed = self._replay(iteration.version)
        self._replayed = _responses(replayed)
        self._means.extend(float(group.rewards(self.reward_key).mean()) for group in fresh)
        self._keep(fresh)
        return fresh + replayed

    def loss_weight(self, version: int) -> float:
        """Returns the loss weight of replayed responses at a policy version."""
        if version >= self.warm_up:
            return self.coefficient
        return self.coefficient * (1 - math.cos(math.pi * version / self.warm_up)) / 2

    def _replay(self, version: int) -> list[Group]:
        self._kept = [group for group in self._kept if version - group.version <= self.max_age]
        if _responses(self._kept) < self.start:
            return []
        baseline, weight = median(self._means), self.loss_weight(version)
        found = [self._above(group, baseline, weight) for group in self._kept]
        self._kept = []
        return [group for group in found if group.responses]

    def _above(self, group: Group, baseline: float, weight: float) -> Group:
        """Returns the group's responses with a reward above the baseline; the excess is their advantage."""
        advantages = group.rewards(self.reward_key) - baseline
        better = (advantages > 0).tolist()
        return replace(
            group,
            responses=[response for response, kept in zip(group.responses, better, strict=True) if kept],
            advantages=advantages[advantages > 0],
            loss_weight=weight,
        )

    def _keep(self, fresh: Sequence[Group]) -> None:
        for group in fresh:
            standardized = group_normalized(group.rewards(self.reward_key)[None])[0].tolist()
            worth = [r for r, a in zip(group.responses, standardized, strict=True) if a > self.threshold]
            if worth:
                self._kept.append(replace(group, responses=worth))
        while _responses(self._kept) > self.capacity:
            self._kept.pop(0)

    def report(self) -> dict[str, float]:
        """Returns the numbers of responses replayed last and stored now, and the next replay's baseline."""
        return {
            "replay/replayed_responses": float(self._replayed),
            "replay/stored_responses": float(_responses(self._kept)),
            "replay/baseline": median(self._means) if self._means else math.nan,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores responses and group means, and keeps the newest if the sizes are smaller now."""
        super().load_state_dict(state)
        while _responses(self._kept) > self.capacity:
            self._kept.pop(0)


def _responses(groups: Sequence[Group]) -> int:
    return sum(len(group.responses) for group in groups)
