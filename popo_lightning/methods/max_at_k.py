"""Advantages for the best of k responses instead of the mean response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from popo_lightning.core.bounds import at_least, one_of
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.objectives.advantages import Advantage, check_group_size, zero_if_ineffective
from popo_lightning.objectives.inputs import LOG_RATIO_BOUND

Baseline = Literal["none", "leave_one_out", "centered"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


@lru_cache(maxsize=64)
def _choices(size: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (one, two, three), each (size + 1,) float64 and divided by C(size, k).

    Entry p counts the subsets of size k with 1, 2 or 3 given members, whose other members come from p candidates.
    """

    def choose(named: int) -> Tensor:
        ways = [math.comb(places, k - named) / math.comb(size, k) if k >= named else 0.0 for places in range(size + 1)]
        return torch.tensor(ways, dtype=torch.float64)

    return choose(1), choose(2), choose(3)


def max_at_k(rewards: Tensor, k: int) -> Tensor:
    """Estimates the expected best reward of k responses, without bias, by the mean best of all subsets of size k.

    Args:
        rewards: (..., K) rewards.
        k: Subset size, from 1 (gives the mean) to K (gives the maximum).

    Returns:
        (...) estimates, float64.
    """
    size = rewards.shape[-1]
    ascending = rewards.double().sort(dim=-1).values
    return (ascending * _choices(size, k)[0][:size]).sum(dim=-1)


def best_with(rewards: Tensor, deviation: Tensor, k: int) -> Tensor:
    """Sums, for each response, the best reward over the subsets of size k that contain it, divided by C(K, k).

    A subset has the weight 1 + the sum of its members' deviations, which to first order is the product of their ratios.

    Args:
        rewards: (K,) rewards, float64, in ascending order.
        deviation: (K,) float64, ratio - 1 of each response.
        k: Size of the subsets.
    """
    size = len(rewards)
    one, two, three = _choices(size, k)
    place = torch.arange(size)  # number of responses below each
    below = deviation.cumsum(0) - deviation
    # Clamped indices belong to responses with nothing below, and are multiplied by 0.
    two, three = two[(place - 1).clamp(min=0)], three[(place - 2).clamp(min=0)]
    itself = one[:size] * (1 + deviation) + two * below
    # Another response j is the best: k - 2 members are left to draw from those below it without i.
    pair = two * (1 + deviation[:, None] + deviation)
    third = three * (below - deviation[:, None])
    return itself * rewards + (torch.triu(pair + third, diagonal=1) * rewards).sum(dim=1)


def best_without(rewards: Tensor, deviation: Tensor, k: int) -> Tensor:
    """Does as `best_with`, but with the best reward among the subset's other members.

    For k = 1 it uses the mean reward of the other responses. The result does not depend on the response's own reward,
    so it is a baseline that leaves the gradient unbiased.
    """
    size = len(rewards)
    if k == 1:
        others = (rewards.sum() - rewards) / (size - 1)
        return others * (1 + deviation) / size
    _, two, three = _choices(size, k)
    below = deviation.cumsum(0) - deviation
    index = torch.arange(size)
    # Number of other responses below the best one j: one fewer if the response itself, i, is below it.
    is_below = index[:, None] < index
    place = index - is_below.long()
    pair = two[place] * (1 + deviation[:, None] + deviation)
    third = three[(place - 1).clamp(min=0)] * (below - torch.where(is_below, deviation[:, None], 0.0))
    return ((pair + third).fill_diagonal_(0.0) * rewards).sum(dim=1)


def max_at_k_advantages(
    rewards: Tensor, k: int, deviation: Tensor | None = None, baseline: Baseline = "none"
) -> Tensor:
    """Returns advantages whose REINFORCE gradient, averaged over the group's responses, is that of the best of k.

    arXiv 2510.23393. With d = ratio - 1 of each response, S running over the subsets of size k,

        A_i = K / C(K, k) * sum over S with i in S of (1 + sum over l in S of d_l) * max R_S,

    which for k = 1 and d = 0 is R_i. The baselines are `MaxAtK`'s.

    Args:
        rewards: (K,) rewards.
        k: Number of responses of which the best counts.
        deviation: (K,) pi_prox / pi_behave - 1 of each response; None means 0.
        baseline: Baseline to subtract.

    Returns:
        (K,) advantages, with the dtype of `rewards`.
    """
    size = len(rewards)
    ascending, order = rewards.double().sort()
    given = torch.zeros(size, dtype=torch.float64) if deviation is None else deviation.double()[order]
    advantages = size * best_with(ascending, given, k)
    if baseline == "leave_one_out":
        advantages = advantages - size * best_without(ascending, given, k)
    elif baseline == "centered":
        # k times the metric; subsets without the response also include the response's own deviation in their weight.
        plain = best_with(ascending, torch.zeros_like(given), k)
        metric = best_with(ascending, given, k).sum() + given * (max_at_k(ascending, k) - plain) * k
        advantages = (advantages - metric) * size / (size - k)
    if baseline != "none":
        advantages = zero_if_ineffective(advantages, ascending)
    return torch.empty_like(advantages).index_copy(0, order, advantages).to(rewards.dtype)


class MaxAtK(Advantage):
    """The policy gradient of the best of k responses, arXiv 2510.23393 (related: PKPO, arXiv 2505.15201).

    Formula: `max_at_k_advantages`. The gradient of the expected best reward of k responses, estimated from all subsets
    of size k of the group's K responses, is the sum over responses of the mean over subsets of the subset's best reward
    times grad log pi. For k = 1 the advantage is the reward itself.

    With `off_policy` a replayed group's subsets are weighted by the product of the members' pi_prox / pi_behave over
    whole responses, to first order. The product contains the response's own ratio, so the behavior weight must be
    `NoCorrection` (`includes_is_weight`). It needs the proximal log-probs of replayed groups, which the proximal policy
    records in any case. A group that prox itself sampled gets exactly the on-policy weights. Stored: nothing. Extra
    passes: none.

    The source, as far as it could be read, has no baseline. The baselines are

        none: the source's formula. Where all rewards are positive, every response is pushed up.
        leave_one_out: the best of each subset without the response is subtracted (PKPO). Unbiased, never negative.
        centered: k times the estimated metric is subtracted, and the rest multiplied by K / (K - k). Derived here: the
            product of the metric and the sum of grad log pi has the metric's gradient as its mean, so the subtraction
            scales the expected gradient by (K - k) / K, and the factor undoes it. Unbiased, of mean 0, and
            leave-one-out for k = 1. Needs k < K.

    With a baseline, ineffective groups get exactly 0; without one, they do not.

    Deviations: ratios are capped; the source may clip instead (unknown). The factor K keeps the size of the reward
    under an objective that averages over responses.

    Args:
        k: Number of responses of which the best counts; at most data.group_size.
        off_policy: Correct replayed groups for the policy that sampled them.
        baseline: none, leave_one_out or centered.
        ratio_cap: Upper bound of a response's pi_prox / pi_behave, because the first order holds only near 1.
    """

    def __init__(self, k: int, off_policy: bool = False, baseline: Baseline = "none", ratio_cap: float = 2.0) -> None:
        self.k = at_least("MaxAtK.k", k, 1, ", where the mean reward is optimized")
        self.off_policy = off_policy
        self.baseline = one_of("MaxAtK.baseline", baseline, BASELINES)
        self.ratio_cap = at_least("MaxAtK.ratio_cap", ratio_cap, 1, ", the ratio of an on-policy response")
        self.needs_prox = off_policy
        self.includes_is_weight = off_policy

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K) of groups that prox sampled."""
        return torch.stack([self._of_group(row, None) for row in rewards])

    def for_group(
        self,
        group: Group,
        reward: str,
        prox_logp: Sequence[Tensor] | None = None,
        values: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Returns one scalar advantage per response."""
        deviation = self.deviation(group, prox_logp) if self.off_policy and prox_logp is not None else None
        return list(self._of_group(group.rewards(reward), deviation).unbind())

    def objection(self, group_size: int) -> str | None:
        """Objects to groups that are too small for k, and for k and the baseline that leaves a response out."""
        if self._least <= group_size:
            return None
        more = "" if self._least == self.k else f" with baseline {self.baseline}, which needs {self._least}"
        return (
            f"model.advantage.k is {self.k}{more}, more than the {group_size} responses of a group (data.group_size); "
            "lower the first or raise the second"
        )

    @property
    def _least(self) -> int:
        """Least number of responses in a group."""
        return self.k + (self.baseline == "centered")

    def deviation(self, group: Group, prox_logp: Sequence[Tensor]) -> Tensor:
        """Returns (K,) the capped pi_prox / pi_behave of whole responses, minus 1."""
        log_ratios = [
            float((prox.double() - response.behave_logp.double()).sum())
            for prox, response in zip(prox_logp, group.responses, strict=True)
        ]
        bounded = torch.tensor(log_ratios, dtype=torch.float64).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        return bounded.exp().clamp(max=self.ratio_cap) - 1

    def _of_group(self, rewards: Tensor, deviation: Tensor | None) -> Tensor:
        size = rewards.shape[-1]
        if self.baseline != "none":
            check_group_size(rewards)
        if size < self._least:
            raise SettingError(
                f"MaxAtK.k is {self.k} with the baseline {self.baseline}, which needs groups of at least {self._least} "
                f"responses, and a group has {size}; lower k or raise data.group_size."
            )
        return max_at_k_advantages(rewards, self.k, deviation, self.baseline)


class BestMinusSecond(Advantage):
    """Only the best response learns, with R_best - R_second; all others get 0 (verl grpo_passk, after 2503.19595).

    The objective is the best of all K, with the best of the others as baseline: `MaxAtK(K, baseline="leave_one_out")` /
    K. A tie at the top gives 0 everywhere, and ineffective groups get exactly 0. Stored: nothing. Extra passes: none.

    Args:
        normalize_by_std: Divide by the group's std, as verl does by default.
        eps: Added to the std.
    """

    def __init__(self, normalize_by_std: bool = False, eps: float = 1e-6) -> None:
        self.normalize_by_std = normalize_by_std
        self.eps = at_least("BestMinusSecond.eps", eps, 0, ", such as 1e-6")

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K)."""
        check_group_size(rewards)
        best, place = rewards.topk(2, dim=-1)
        lead = best[..., :1] - best[..., 1:]
        if self.normalize_by_std:
            lead = lead / (rewards.std(dim=-1, keepdim=True, correction=1) + self.eps)
        advantages = torch.zeros_like(rewards).scatter(-1, place[..., :1], lead)
        return zero_if_ineffective(advantages, rewards)
