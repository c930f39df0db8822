"""Tree-OPO (arXiv 2509.09284): rollouts restart inside earlier responses, with baselines from the prefix tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Literal

import torch
from torch import Tensor

from popo_lightning.core.bounds import one_of
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.objectives.advantages import Advantage, check_group_size, zero_if_ineffective
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.prefixes import checked_shares, cut_response

Kind = Literal["mean", "max", "min"]
BASELINES: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


class TreeBaseline(Advantage):
    """Tree-OPO's heuristic advantages: R minus mean, max or min of the prefix's subtree (arXiv 2509.09284).

    The subtree of a prefix holds the group's own responses and those of deeper restarts. A composer that restarts from
    prefixes attaches the latter's rewards as `group.subtree_rewards`. max is optimistic: only the best response is not
    punished. min is pessimistic: only the worst is not rewarded. There is no division by the std. Extra passes: none.

    A group whose subtree's rewards are all equal gets exactly 0. A group that is all wrong but has correct restarts
    does not, because a correct answer was within reach.

    Deviations: the source's main rule, a quadratic program with order constraints over the tree, is not this class.
    Subtree rewards are the training reward, where the source has outcomes of 0 and 1.

    Args:
        kind: Baseline over the subtree: mean, max or min.
    """

    def __init__(self, kind: Kind = "mean") -> None:
        self.kind = one_of("TreeBaseline.kind", kind, tuple(BASELINES))

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K) of groups without deeper restarts."""
        return self._against(rewards, rewards)

    def for_group(
        self,
        group: Group,
        reward: str,
        prox_logp: Sequence[Tensor] | None = None,
        values: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Returns one scalar advantage per response."""
        rewards = group.rewards(reward)
        deeper = group.subtree_rewards
        subtree = rewards if deeper is None else torch.cat((rewards, deeper.to(rewards)))
        return list(self._against(rewards, subtree).unbind())

    def _against(self, rewards: Tensor, subtree: Tensor) -> Tensor:
        check_group_size(subtree)
        baseline = BASELINES[self.kind](subtree, dim=-1, keepdim=True)
        return zero_if_ineffective(rewards - baseline, subtree)


class PrefixTree(Composer):
    """Tree-OPO's data without a teacher: half of each group restarts inside the other half (2509.09284).

    In one iteration each problem gets ceil(K / 2) responses from its prompt. One of them, drawn at random, is cut at a
    random length, and floor(K / 2) responses continue from there. The restarts form a child group, and the parent knows
    their rewards as `subtree_rewards`. Use the advantage `TreeBaseline`, which compares a parent's responses with the
    whole subtree and a child's with the child. The prefix is part of the child's prompt, so it has no second loss.
    Stored: nothing. There is a second round of sampling per iteration, and K responses per problem in total.

    Deviations: the source's prefixes come from a teacher's tree search, made offline and several levels deep. Here they
    are the policy's own, fresh, and one level deep. The source's main advantage, a quadratic program, is not
    implemented (`TreeBaseline` has its heuristic forms).

    Args:
        cut: Minimum and maximum length of a prefix as a fraction of the response's tokens.
        reward_key: Reward component of the subtree's rewards; must be the one trained on (model.reward_key).
    """

    follows_reward = True
    supports_async = False

    def __init__(self, cut: tuple[float, float] = (0.25, 0.75), reward_key: str = "score") -> None:
        self.cut = checked_shares("PrefixTree", cut)
        self.reward_key = reward_key

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the parents, with their children's rewards attached, then the children."""
        restarts = iteration.group_size // 2
        if restarts < 2:
            raise SettingError(
                f"data.group_size is {iteration.group_size}; PrefixTree halves each group and a half needs two "
                "responses to differ, so use at least 4"
            )
        parents = iteration.rollout(n=iteration.group_size - restarts)
        prefixes = [self._prefix(group, iteration.random("PrefixTree", i)) for i, group in enumerate(parents)]
        children = iteration.sample([group.problem for group in parents], restarts, prefixes)
        parents = [
            replace(parent, subtree_rewards=child.rewards(self.reward_key))
            for parent, child in zip(parents, children, strict=True)
        ]
        return parents + children

    def _prefix(self, group: Group, random: Random) -> Tensor:
        return cut_response(random.choice(group.responses), self.cut, random)
