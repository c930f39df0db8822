"""Preference pairs from effective groups: a better and a worse response to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch

from popo_lightning.core.bounds import at_least
from popo_lightning.core.groups import REWARD_TOLERANCE, Group
from popo_lightning.replay.buffer import GroupReplayBuffer, resharded
from popo_lightning.replay.composer import Composer, Iteration


def as_pair(group: Group, better: int, worse: int, loss_weight: float = 1.0) -> Group:
    """Returns two of a group's responses as a pair, the better one first. Advantages 1 and -1 only distinguish them.

    Args:
        group: Group of K responses.
        better: Index of the better response.
        worse: Index of the worse response.
        loss_weight: Factor of both responses' loss.
    """
    return replace(
        group,
        responses=[group.responses[better], group.responses[worse]],
        advantages=torch.tensor([1.0, -1.0]),
        loss_weight=loss_weight,
    )


def best_and_worst(group: Group, reward_key: str, most: int, random: Random) -> list[Group]:
    """Pairs the best with the worst response, the second best with the second worst, and so on.

    No two pairs share a response. Equal responses come in a random order. Pairs of equal rewards are left out.

    Args:
        group: Group of K graded responses.
        reward_key: Reward component that ranks the responses.
        most: Maximum number of pairs.
        random: Decides between equal responses.
    """
    rewards = group.combined(reward_key).tolist()
    order = list(range(len(rewards)))
    random.shuffle(order)
    order.sort(key=rewards.__getitem__)  # stable, so equal rewards stay shuffled
    ends = zip(order[::-1][:most], order[:most], strict=True)  # beyond the middle, the difference is not positive
    return [as_pair(group, best, worst) for best, worst in ends if rewards[best] - rewards[worst] > REWARD_TOLERANCE]


class Pairs(Composer):
    """Makes pairs from the effective fresh groups, on-policy, with a verifier's labels instead of an annotator's.

    A group's best response by data.effective_key is paired with its worst. The seed decides between equal ones. The
    loss must compare pairs (PairLoss). Stored: nothing. Extra rollouts and passes: none. Responses that are in no pair
    are not trained on.

    Args:
        pairs_per_group: Maximum number of pairs per group. No two of its pairs share a response.
    """

    fixes_advantages = True
    makes_pairs = True

    def __init__(self, pairs_per_group: int = 1) -> None:
        setting = f"{type(self).__name__}.pairs_per_group"
        self.pairs_per_group = at_least(setting, pairs_per_group, 1, ", such as 1")

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the pairs of :meth:`groups`."""
        return self.pairs(iteration, self.groups(iteration)[0])

    def groups(self, iteration: Iteration) -> tuple[list[Group], list[Group]]:
        """Returns (effective groups to make pairs of, ineffective fresh groups)."""
        return iteration.split(iteration.rollout())

    def pairs(self, iteration: Iteration, groups: Sequence[Group]) -> list[Group]:
        """Returns the pairs of some groups, in their order. A stored group may give other pairs each iteration."""
        return [
            pair
            for group in groups
            for pair in best_and_worst(
                group, iteration.effective_key, self.pairs_per_group, iteration.random("pairs", group.id)
            )
        ]


class ReplayedPairs(Pairs):
    """Makes pairs from the effective fresh groups, and from stored groups that replace ineffective ones, as in POPO.

    Selection precedes insertion. A stored group is paired again each time, so that different equal responses are
    paired. Extra rollouts and passes: none.

    Args:
        buffer: Replay buffer of effective groups.
        pairs_per_group: Maximum number of pairs per group. No two of its pairs share a response.
    """

    state = ("buffer",)

    def __init__(self, buffer: GroupReplayBuffer, pairs_per_group: int = 1) -> None:
        super().__init__(pairs_per_group)
        self.buffer = buffer

    def groups(self, iteration: Iteration) -> tuple[list[Group], list[Group]]:
        """Returns (effective fresh and stored groups, ineffective fresh groups)."""
        effective, ineffective = super().groups(iteration)
        candidates = self.buffer.newest_first(iteration.version, wanted=iteration.still_effective)
        stored = self.buffer.replay(effective, ineffective, candidates)
        return effective + stored, ineffective

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """Redistributes all stored groups over the ranks."""
        return resharded(states, ranks)
