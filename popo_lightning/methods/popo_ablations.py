"""POPO's ablations (2606.01281): POPO with one of its choices reversed. One class per ablation.

The paper's body could not be read. The authors' article says what each ablation is; how it is built is inferred.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from popo_lightning.core.bounds import at_least, one_of, within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.objectives.inputs import LOG_RATIO_BOUND
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Iteration


class KLRanked(PrioritizedGroupReplay):
    """POPO with stored groups ranked by how far the policy has moved from them, instead of by age.

    Source: POPO's KL ablation (2606.01281), which reaches about the same accuracy in 4.8 h instead of 3.2 h.

    Formula: d = log policy - log behave of a stored token, which is behave's sample. The group's KL(behave || policy)
    is the token mean of -d (k1) or of exp(d) - 1 - d (k3); d is clamped to +-20. The groups with the lowest KL are
    replayed, the newest first among equal ones, and no problem twice if that can be avoided.

    Stored: what POPO stores. Extra passes: one forward pass over all stored groups of an allowed age (phase "rescore"),
        in iterations where there is a choice. With no place to fill, or at least as many places as candidates, every
        ranking would give the same batch.

    Deviations: estimator, direction and the mean over tokens are not documented. The direction is the one whose samples
    are available.

    Args:
        buffer: Replay buffer of effective groups.
        estimator: KL estimator. k3 is never negative and varies less; k1 may be negative for single groups.
    """

    def __init__(self, buffer: GroupReplayBuffer, estimator: Literal["k1", "k3"] = "k3") -> None:
        super().__init__(buffer)
        self.estimator = one_of("data.composer.estimator", estimator, ("k1", "k3"))

    def candidates(self, places: int, iteration: Iteration) -> Iterable[Group]:
        """Returns the stored groups, those nearest to the present policy first."""
        found = list(super().candidates(places, iteration))
        if not 0 < places < len(found):
            return found
        present = zip(found, iteration.logprobs(found), strict=True)
        estimates = [group_kl(group.responses, logprobs, self.estimator) for group, logprobs in present]
        order = sorted(range(len(found)), key=estimates.__getitem__)  # stable: newest first among equals
        return [found[place] for place in order]


def group_kl(responses: list[Response], present_logp: list[Tensor], estimator: str) -> float:
    """Estimates KL(behave || policy) of a group from its own tokens.

    Args:
        responses: K stored responses.
        present_logp: (T,) log-probs of each response under the present policy.
        estimator: KL estimator, k1 or k3.
    """
    behave = torch.cat([response.behave_logp for response in responses])
    moved = (torch.cat(present_logp) - behave).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    values = -moved if estimator == "k1" else moved.expm1() - moved
    return float(values.double().mean())


class AnyGroup(PrioritizedGroupReplay):
    """POPO that does not distinguish effective groups: stores any group and replaces any group.

    Source: POPO's ablation without effective and ineffective groups (2606.01281), worse than POPO.

    Formula: the newest stored groups, effective or not, replace fresh groups drawn at random, as many as are
    ineffective. The replayed share is therefore POPO's, and only the prioritization is removed.

    Stored: up to the buffer's capacity of groups, whether effective or not; null keeps an iteration's worth. Extra
    passes: none.

    Deviations: how the paper builds it is not documented. If the buffer has too few groups, the fresh groups keep their
    places, because an empty place would not be a group of any kind.

    Args:
        buffer: Replay buffer of groups.
        replaced: Fraction of the fresh groups to replace; null takes the fraction of ineffective ones.
    """

    def __init__(self, buffer: GroupReplayBuffer, replaced: float | None = None) -> None:
        if replaced is not None:
            within("data.composer.replaced", replaced, 0, 1, "0.5, or null for the share of ineffective groups")
        super().__init__(buffer)
        self.replaced = replaced

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the fresh groups that are not replaced, in order, then the stored ones."""
        fresh = iteration.rollout()
        count = len(iteration.split(fresh)[1]) if self.replaced is None else round(self.replaced * len(fresh))
        given_up = iteration.random("places").sample(range(len(fresh)), count)
        kept = {group.problem.id for place, group in enumerate(fresh) if place not in given_up}
        stored = self.buffer.newest(count, iteration.version, exclude_problems=kept)
        gone = set(given_up[: len(stored)])
        self.buffer.used(stored)
        self.buffer.insert(fresh, len(fresh))
        return [group for place, group in enumerate(fresh) if place not in gone] + stored


class Stale(PrioritizedGroupReplay):
    """POPO with groups of a minimum age: replays the newest that are at least that many versions old.

    Source: POPO's ablation stale(10) (2606.01281), which collapses on the paper's tasks.

    Formula: POPO's, with age = present version - group's >= min_age. The first min_age iterations have nothing to
    replay and train on their effective groups alone.

    Stored: (min_age + 1) x the groups an iteration samples, unless capacity says more. That is the worst case, in which
    every group of min_age iterations was effective and too young, and a whole batch is wanted. A smaller capacity is
    refused, because it could silently become the filter ablation. Extra passes: none.

    Deviations: it takes the newest groups of at least that age. The paper may instead mean a buffer delayed by that
    many steps; this is not documented.

    Args:
        buffer: Replay buffer of effective groups. Its capacity is null or at least as above, its max_age null or at
            least min_age.
        min_age: Minimum age of a replayed group in policy versions.
    """

    def __init__(self, buffer: GroupReplayBuffer, min_age: int = 10) -> None:
        at_least("data.composer.min_age", min_age, 1, ", the age of the newest stored group")
        if buffer.max_age is not None and buffer.max_age < min_age:
            raise SettingError(
                f"data.composer.buffer.max_age is {buffer.max_age}, but groups are replayed at an age of {min_age} or "
                "more (data.composer.min_age); set max_age to null"
            )
        super().__init__(buffer)
        self.min_age = min_age
        self.kept_iterations = min_age + 1

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns effective fresh groups, then replayed ones of at least the minimum age."""
        sampled, capacity = iteration.num_problems, self.buffer.capacity
        needed = self.kept_iterations * sampled
        if capacity is not None and capacity < needed:
            raise SettingError(
                f"data.composer.buffer.capacity is {capacity}, but groups {self.min_age} versions old "
                f"(data.composer.min_age) may need {needed} at {sampled} problems an iteration; set it to null or to "
                f"{needed}"
            )
        return super().compose(iteration)

    def candidates(self, places: int, iteration: Iteration) -> Iterable[Group]:
        """Returns the stored groups of at least the minimum age, the newest first."""
        return self.buffer.newest_first(iteration.version, self.min_age, iteration.still_effective)
