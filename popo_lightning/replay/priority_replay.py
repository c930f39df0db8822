"""Composers that replay stored groups by a priority: FreshPER's, which decays with age, and TRL's, which does not."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, Literal

from torch import Tensor

from popo_lightning.groups import Group
from popo_lightning.objectives.advantages import group_normalised
from popo_lightning.objectives.settings import above, at_least, one_of, within
from popo_lightning.replay.composers import Composer, Iteration

# Added to a priority's base, so that everything stored can be drawn; FreshPER's.
LEAST_BASE = 1e-6


class FreshPER(Composer):
    """Prioritized replay whose priorities decay with age (arXiv 2604.16918; Vision-CAIR/Freshness-Aware-PER).

    The fresh batch, and K batches drawn from the store without replacement within a batch, group i with probability

        P(i) = p_i^alpha / sum_j p_j^alpha,   p_i = (base_i + 1e-6) exp(-age_i / tau).

    base is the mean of |R| or of |A| in the group; a priority halves every tau ln 2 versions. The loss of a drawn
    group is multiplied by (N P(i))^-beta, divided by its greatest value over the store, which is
    (min_j P(j) / P(i))^beta; beta goes from its start to 1 in a straight line. The source's loss, a clip around behave
    without the responses that its ratio filter rejects, is ``FilteredBehaveAligned``.

    Keeps the newest ``capacity`` groups, first in, first out, as the source does by default. Needs the group's rewards
    only, no pass; an iteration trains on K + 1 times as many groups for the same rollouts.

    Deviations: the source stores single trajectories, here the unit is the group, so ineffective groups, which teach
    nothing, are left out by default. New entries have the priority of their rewards, where the source gives them the
    greatest one until they have been trained on. Draws are without replacement, the source's stratified. The source
    also offers |TD error|, which needs a critic. Its capacity is 50,000 trajectories. How long beta takes is unknown.

    Args:
        replay_batches: K, stored batches to a fresh one.
        base: advantage or reward, of the part data.effective_by.
        tau: Decay constant in policy versions.
        exponent: alpha; 0 draws evenly.
        beta: Correction for the uneven draw at the start; 0 is none, 1 is whole.
        beta_iterations: Iterations until beta is 1.
        capacity: Groups kept, on each rank.
        effective_only: Leave groups without a spread of rewards out of the store. Set it to false with an advantage
            that learns from them.
    """

    def __init__(
        self,
        replay_batches: int = 1,
        base: Literal["advantage", "reward"] = "advantage",
        tau: float = 500.0,
        exponent: float = 0.6,
        beta: float = 0.4,
        beta_iterations: int = 500,
        capacity: int = 1024,
        effective_only: bool = True,
    ) -> None:
        self.replay_batches = int(at_least("FreshPER.replay_batches", replay_batches, 1, ", such as 1"))
        self.base = one_of("FreshPER.base", base, ("advantage", "reward"))
        self.tau = above("FreshPER.tau", tau, 0, "500")
        self.exponent = at_least("FreshPER.exponent", exponent, 0, ", such as 0.6")
        self.beta = within("FreshPER.beta", beta, 0, 1, "0.4")
        self.beta_iterations = int(at_least("FreshPER.beta_iterations", beta_iterations, 1, ", such as 500"))
        self.capacity = int(at_least("FreshPER.capacity", capacity, 1, ", such as 1024"))
        self.effective_only = effective_only
        self._groups: deque[Group] = deque(maxlen=self.capacity)

    def compose(self, iteration: Iteration) -> list[Group]:
        """The fresh groups, then the drawn ones; the draw comes before the fresh groups are stored."""
        fresh = iteration.rollout()
        stored = list(self._groups)
        log_priorities = [self._log_priority(group, iteration) for group in stored]
        replayed: list[Group] = []
        for batch in range(self.replay_batches):
            drawn = draw(log_priorities, iteration.problems, iteration.random("freshper", batch))
            replayed += [self._weighted(stored[i], log_priorities[i] - min(log_priorities), iteration) for i in drawn]
        self._groups.extend(iteration.split(fresh)[0] if self.effective_only else fresh)
        return fresh + replayed

    def _log_priority(self, group: Group, iteration: Iteration) -> float:
        """The logarithm of p^alpha: a priority itself would vanish after some thousand versions."""
        rewards = group.rewards(iteration.effective_by)
        values = rewards if self.base == "reward" else group_normalised(rewards[None])[0]
        age = iteration.version - group.version
        return self.exponent * (math.log(float(values.abs().mean()) + LEAST_BASE) - age / self.tau)

    def _weighted(self, group: Group, above_least: float, iteration: Iteration) -> Group:
        progress = min(1.0, iteration.version / self.beta_iterations)
        beta = self.beta + (1 - self.beta) * progress
        return replace(group, loss_weight=math.exp(-beta * above_least))

    def state_dict(self) -> dict[str, Any]:
        """The stored groups; priorities follow from them."""
        return {"groups": [group.to_plain() for group in self._groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The stored groups, of which the present capacity keeps the newest."""
        self._groups = deque((Group.from_plain(group) for group in state["groups"]), maxlen=self.capacity)


class ScorePriority(Composer):
    """The best groups fill the place of ineffective ones: TRL's experimental GRPO with a replay buffer.

    A heap of bounded size keeps the effective groups of the greatest score

        score = sum over responses of |A|  *  std of the group's rewards,   A = (R - mean) / (std + 1e-6),

    which is the sum of |R - mean|. Each ineffective group gives way to one drawn in proportion to score: without
    replacement, or, if there are fewer than wanted, with it. What is drawn stays. Age does not count, so a group can
    stay for good. TRL's loss has the ratio pi_policy / pi_behave, clipped around 1: BehaveAligned, with behaviour
    weight One. Nothing is sampled or passed forward more.

    Deviations: an iteration's own groups are stored after the draw unless ``insert_first``, as in TRL, where they may
    come twice. TRL's scores tie by comparing dictionaries, which fails; here the older group leaves. While the store is
    empty, ineffective groups stay.

    Args:
        capacity: Groups kept, on each rank.
        insert_first: Store an iteration's effective groups before its draw, as TRL does.
    """

    def __init__(self, capacity: int = 64, insert_first: bool = False) -> None:
        self.capacity = int(at_least("ScorePriority.capacity", capacity, 1, ", such as 64"))
        self.insert_first = insert_first
        self._heap: list[tuple[float, int, Group]] = []  # the number breaks ties: groups have no order
        self._seen = 0

    def compose(self, iteration: Iteration) -> list[Group]:
        """The effective fresh groups, then one drawn for each ineffective one."""
        fresh = iteration.rollout()
        effective, ineffective = iteration.split(fresh)
        if self.insert_first:
            self._insert(effective, iteration.effective_by)
        replayed = self._draw(len(ineffective), iteration.random("score_priority"))
        if not self.insert_first:
            self._insert(effective, iteration.effective_by)
        return effective + (replayed or ineffective)

    def _insert(self, groups: Sequence[Group], part: str) -> None:
        for group in groups:
            entry = (spread_score(group.rewards(part)), self._seen, group)
            self._seen += 1
            if len(self._heap) < self.capacity:
                heapq.heappush(self._heap, entry)
            elif entry[0] > self._heap[0][0]:
                heapq.heapreplace(self._heap, entry)

    def _draw(self, count: int, random: Random) -> list[Group]:
        if not self._heap:
            return []
        scores = [entry[0] for entry in self._heap]
        if count > len(scores):
            return [entry[2] for entry in random.choices(self._heap, scores, k=count)]
        return [self._heap[i][2] for i in draw([math.log(score) for score in scores], count, random)]

    def state_dict(self) -> dict[str, Any]:
        """The heap, in the order of its array, on which draws depend."""
        return {"heap": [[score, seen, group.to_plain()] for score, seen, group in self._heap], "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The heap, of which the present capacity keeps the best."""
        heap = [(score, seen, Group.from_plain(group)) for score, seen, group in state["heap"]]
        if len(heap) > self.capacity:
            heap = sorted(heap, key=lambda entry: entry[:2])[-self.capacity :]  # a sorted list is a heap
        self._heap, self._seen = heap, state["seen"]


def spread_score(rewards: Tensor) -> float:
    """TRL's score of a group: sum |A| times the std of the rewards.

    Args:
        rewards: (K,).
    """
    return float(group_normalised(rewards[None]).abs().sum() * rewards.std(correction=1))


def draw(log_weights: Sequence[float], count: int, random: Random) -> list[int]:
    """Places drawn one after the other in proportion to their weights, none twice.

    Each place gets an exponential clock of its weight as rate; the first to ring are those that drawing one by one
    would give (Efraimidis and Spirakis 2006).

    Args:
        log_weights: Logarithms of the weights, which need not add up to 1.
        count: Places wanted; all, if there are fewer.
        random: One draw a place.
    """
    rings = [math.log(max(random.expovariate(1.0), 1e-300)) - log_weight for log_weight in log_weights]
    return sorted(range(len(rings)), key=rings.__getitem__)[:count]
