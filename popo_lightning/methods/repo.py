"""RePO (arXiv 2506.09340): replays stored responses of a problem beside its fresh ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from statistics import pvariance
from typing import Literal, get_args

from popo_lightning.core.bounds import above, one_of
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.response_store import ResponseStore

Retrieval = Literal["recent", "reward", "random", "variance", "all"]
RETRIEVALS: tuple[Retrieval, ...] = get_args(Retrieval)


@dataclass(eq=False)
class RePO(Composer):
    """RePO: beside each fresh group, stored responses of the same problem (2506.09340; SihengLi99/RePO).

    J = J_on + coefficient * J_off, both PPO's clipped surrogate of pi_policy / pi_behave around 1 (trust region
    `BehaveAligned`, behave weight `NoCorrection`). A problem's responses are replayed once `start` of them are stored.
    With advantages "split" the replayed ones form a separate group, are normalized among themselves, and have the
    coefficient as loss weight. With "mixed" one group holds all of them. Replayed responses are chosen before the fresh
    ones are stored. Stored: the newest `capacity` responses of each problem with their behave log-probs. Extra
    rollouts: none. Extra rows: `replays` for each problem that has enough.

    The retrieval `variance` takes the subset whose rewards have the greatest variance, and among equal ones the
    greatest sum. The source tries all subsets; here only sets of the lowest and highest rewards are tried, which gives
    the same.

    Deviations: both terms are divided by one denominator, that of fresh and replayed rows together. With `SequenceMean`
    this is the public code's loss type grpo. The paper's formula divides each by its own count, which makes a step with
    replays up to twice as long. "mixed" has no coefficient other than 1. Ranks replay only their own samples, where the
    code shares all. Among equally rewarded responses `reward` takes the newest.

    A problem with K responses at a time must have been asked ceil(start / K) times before its first replay.

    Args:
        capacity: Responses kept per problem.
        start: Number of stored responses from which a problem is replayed.
        replays: Responses replayed beside each fresh group. Retrieval all takes every stored one instead.
        retrieval: Which stored responses are replayed: recent, reward (the best), random, variance or all.
        advantages: split or mixed.
        coefficient: Loss weight of the replayed responses.
        reward_key: Reward component that retrieval reward and variance use.
    """

    follows_reward = True
    state = ("store",)
    transient = ("_replayed",)

    capacity: int = 16
    start: int = 16
    replays: int = 8
    retrieval: Retrieval = "recent"
    advantages: Literal["split", "mixed"] = "split"
    coefficient: float = 1.0
    reward_key: str = "score"

    def __post_init__(self) -> None:
        if not 2 <= self.start <= self.capacity:
            raise SettingError(
                f"RePO.start is {self.start} and RePO.capacity {self.capacity}; a problem never has more stored "
                "responses than its capacity and needs 2 to compare, so use 2 <= start <= capacity"
            )
        if not 2 <= self.replays <= self.capacity:
            raise SettingError(
                f"RePO.replays is {self.replays}; use 2, to compare, up to RePO.capacity ({self.capacity})"
            )
        one_of("RePO.retrieval", self.retrieval, RETRIEVALS)
        one_of("RePO.advantages", self.advantages, ("split", "mixed"))
        above("RePO.coefficient", self.coefficient, 0, "1.0")
        if self.advantages == "mixed" and self.coefficient != 1:
            raise SettingError(
                f"RePO.coefficient is {self.coefficient}, but mixed advantages put all responses into one group with "
                "one weight; use 1.0, or RePO.advantages split"
            )
        self.store = ResponseStore(self.capacity)
        self._replayed = 0  # responses replayed in the last iteration

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the fresh groups; each is followed by its problem's replayed responses, or contains them."""
        fresh = iteration.rollout()
        composed: list[Group] = []
        self._replayed = 0
        for place, group in enumerate(fresh):
            stored = self.store.of(group.problem.id)
            chosen = self._chosen(stored, iteration.random("RePO", place)) if len(stored) >= self.start else []
            composed += self._beside(group, chosen)
            self._replayed += len(chosen)
        for group in fresh:
            self.store.insert(group, group.responses)
        return composed

    def _chosen(self, stored: list[Response], random: Random) -> list[Response]:
        """Chooses the responses to replay from the stored ones, which are given oldest first."""
        count = min(self.replays, len(stored))
        if self.retrieval == "all":
            return stored
        if self.retrieval == "recent":
            return stored[-count:]
        if self.retrieval == "random":
            return random.sample(stored, count)
        rising = sorted(stored, key=self._reward)
        if self.retrieval == "reward":
            return rising[-count:]
        splits = (rising[:low] + rising[len(rising) - count + low :] for low in range(count + 1))
        return max(splits, key=self._variance_and_sum)

    def _variance_and_sum(self, responses: list[Response]) -> tuple[float, float]:
        rewards = [self._reward(response) for response in responses]
        return pvariance(rewards), sum(rewards)  # pvariance is exact, so equal variances compare equal

    def _reward(self, response: Response) -> float:
        return response.parts.get(self.reward_key, 0.0)

    def _beside(self, group: Group, chosen: list[Response]) -> list[Group]:
        if not chosen:
            return [group]
        if self.advantages == "mixed":
            return [replace(group, responses=[*group.responses, *chosen])]
        replayed = replace(
            group,
            id=-1 - group.id,  # fresh groups' ids are unique and not negative
            responses=chosen,
            version=min(group.version_of(response) for response in chosen),
            loss_weight=self.coefficient,
        )
        return [group, replayed]

    def passes_before_replay(self, group_size: int) -> int:
        """Returns how often a problem must have been asked before any of its responses can be replayed."""
        return math.ceil(self.start / group_size)

    def report(self) -> dict[str, float]:
        """Returns the number of responses replayed in the last iteration, and the store's size."""
        return {"replay/replayed_responses": float(self._replayed)} | self.store.report()
