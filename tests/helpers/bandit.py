"""A policy of two answers, short and long, whose best choice under a limit on the mean cost is known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.objectives.advantages import GroupNormalized
from popo_lightning.rollout.limit_settings import Limit
from popo_lightning.rollout.limits import Limits

REWARD, COST, BOUND = (0.6, 0.9), (0.2, 1.0), 0.5
# The mean cost at p(long) = p is 0.2 + 0.8 p, which is the bound at p = 0.375. The reward rises by 0.3 while the cost
# rises by 0.8.
BEST_LONG, BEST_LAMBDA = 0.375, 0.375


@dataclass
class Trace:
    long: list[float]  # probability of the long answer, by iteration
    value: list[float]  # expected cost of the policy, without sampling noise
    limits: Limits


def trained(limit: Limit | None, iterations: int, seed: int = 0, lr: float = 2.0, groups: int = 16) -> Trace:
    """Trains by policy gradient with Dr.GRPO's advantages and groups of 8. Without a limit this is plain Dr.GRPO."""
    random, logit = Random(seed), 0.0
    limits, advantage = Limits(None if limit is None else {"cost": limit}), GroupNormalized(normalize_by_std=False)
    trace = Trace([], [], limits)
    for iteration in range(iterations):
        p = 1 / (1 + math.exp(-logit))
        choices = [[random.random() < p for _ in range(8)] for _ in range(groups)]
        fresh = [_group(iteration * groups + i, chosen) for i, chosen in enumerate(choices)]
        minibatch = Minibatch(limits.charged(fresh, fresh, None, iteration), iteration, 0)
        plain = [a for group in minibatch.groups for a in advantage.for_group(group, "score")]
        gains = torch.stack(minibatch.charged(plain))
        scores: Tensor = torch.tensor([float(long) - p for chosen in choices for long in chosen])
        logit += lr * float((gains * scores).mean())
        trace.long.append(p)
        trace.value.append(COST[0] + (COST[1] - COST[0]) * p)
    return trace


def _group(number: int, chosen: list[bool]) -> Group:
    responses = [
        Response(
            torch.tensor([1]),
            torch.tensor([0.0]),
            "stop",
            parts={"score": REWARD[long], "acc": REWARD[long], "cost": COST[long]},
        )
        for long in chosen
    ]
    return Group(number, Problem(str(number), "", None), torch.tensor([0]), responses, number)
