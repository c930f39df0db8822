"""DPS: chooses problems by a filter that predicts whether their next group will be mixed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lightning.core.bounds import above, at_least, within
from popo_lightning.core.groups import Group
from popo_lightning.tasks.samplers import PromptSampler

STATES = 3  # states of a problem: all responses wrong, some right, all right
WRONG, MIXED, RIGHT = range(STATES)


@dataclass(eq=False)
class DPS(PromptSampler):
    """Asks the problems that are most likely to be mixed next, by a hidden Markov model of each (2603.10887).

    Sources: arXiv 2603.10887 and github.com/maoyixiu/DPS at 5654d52. A problem is in one of three states: all of its
    responses are wrong, some are right, or all are. A group shows the state. Between two steps the state moves by the
    problem's own transition matrix P, where P[i, j] is the probability of i after j. The filter keeps Dirichlet counts
    a (3, 3) for P, with P = a / (sum of each column). It also keeps the posterior b of the state at the last step and
    the prediction p = P b for the next. After a step, with S the one-hot state of a problem that was asked,

        b' = S,  xi = outer(b', b) * P / (its sum),  a <- discount * a + (1 - discount) * prior + xi

    and for a problem that was asked before, but not now, b' = p and a <- discount * a + (1 - discount) * prior. Then
    p <- P b'. A problem that was never asked keeps p = 1/3. Each draw proposes ``candidates * count`` problems at
    random and keeps the ``count`` with the largest p[mixed] + entropy_weight * (entropy of p). Stored: fifteen numbers
    for each problem, and whether it was ever asked. Extra forward passes and rollouts: none.

    The filter is exact where P is known, and where each step since a known state was observed. After a gap, the exact
    posterior is a mixture of Dirichlet distributions, which xi approximates by one.

    Deviations: problems of equal value, such as those never asked, come in an order drawn from the seed; the code sorts
    them by data set index. A step is one rollout call of the composer, so dynamic sampling, which calls several times,
    takes several steps in an iteration. Groups of one problem in the same call are one visit. Every rank proposes from
    its own share of the problems (index % ranks == rank) and filters only those.

    Args:
        candidates: Problems proposed per problem asked. The paper uses 8, and 32 for math.
        discount: Fraction of the transition counts that remains after a step. 1 forgets nothing; the paper uses 0.5,
            and 0.7 for math.
        prior: Initial Dirichlet count of each transition.
        entropy_weight: Weight of the prediction's entropy (nats), added to the probability of mixed. The paper uses 0.
        success_key: Reward component that measures success.
        success_above: A response is correct if that component is greater than this.
    """

    state = ("draws", "counts", "posterior", "prediction", "asked")

    candidates: int = 8
    discount: float = 0.5
    prior: float = 1.0
    entropy_weight: float = 0.0
    success_key: str = "acc"
    success_above: float = 0.5

    def __post_init__(self) -> None:
        at_least("DPS.candidates", self.candidates, 1, " for each problem asked")
        within("DPS.discount", self.discount, 0, 1, "0.5")
        above("DPS.prior", self.prior, 0, "1.0")
        at_least("DPS.entropy_weight", self.entropy_weight, 0)
        self._forget(0)

    def _forget(self, problems: int) -> None:
        """Resets the filters of this rank's problems to the prior."""
        self.draws = 0  # calls of draw; each has its own generator
        self.counts = torch.full((problems, STATES, STATES), self.prior, dtype=torch.float64)  # a, [to, from]
        self.posterior = torch.full((problems, STATES), 1 / STATES, dtype=torch.float64)  # b
        self.prediction = self.posterior.clone()  # p
        self.asked = torch.zeros(problems, dtype=torch.bool)

    def start(self, num_problems: int, seed: int, rank: int, world_size: int) -> None:
        """Begins without any knowledge."""
        super().start(num_problems, seed, rank, world_size)
        self._share = self.own_share()
        self._forget(len(self._share))

    def draw(self, count: int) -> list[int]:
        """Returns the best of a random choice of problems. A count above the share first takes whole passes over it."""
        generator = random.Random(f"{self.seed}/{self.rank}/dps/{self.draws}")
        self.draws += 1
        passes, count = divmod(count, len(self._share))
        own = range(len(self._share))
        proposed = generator.sample(own, min(self.candidates * count, len(own)))  # in random order, which breaks ties
        value = self._values().tolist()
        best = sorted(proposed, key=lambda index: -value[index])[:count]
        return [self._share[index] for index in [*own] * passes + best]

    def _values(self) -> Tensor:
        """Returns (N,) the values by which this rank's problems are chosen."""
        entropy = -torch.xlogy(self.prediction, self.prediction).sum(-1)
        return self.prediction[:, MIXED] + self.entropy_weight * entropy

    def belief(self, index: int) -> list[float]:
        """Returns the predicted probabilities of one of this rank's problems: all wrong, mixed, all right."""
        found: list[float] = self.prediction[self._share.index(index)].tolist()
        return found

    def observe(self, indices: Sequence[int], groups: Sequence[Group]) -> None:
        """Takes a step. Asked problems show their state; all others asked before follow their prediction."""
        if not indices:
            return
        shown = self._shown(indices, groups)
        visited = torch.tensor(list(shown))
        present, known = self.prediction.clone(), self.asked.clone()
        known[visited] = True
        present[visited] = torch.eye(STATES, dtype=torch.float64)[list(shown.values())]
        moved = present[visited][:, :, None] * self.posterior[visited][:, None, :] * _transitions(self.counts[visited])
        counts = self.discount * self.counts + (1 - self.discount) * self.prior
        counts[visited] += moved / moved.sum((1, 2), keepdim=True)
        ahead = (_transitions(counts) * present[:, None, :]).sum(-1)
        self.asked = known
        self.counts = torch.where(known[:, None, None], counts, self.counts)
        self.posterior = torch.where(known[:, None], present, self.posterior)
        self.prediction = torch.where(known[:, None], ahead / ahead.sum(-1, keepdim=True), self.prediction)

    def _shown(self, indices: Sequence[int], groups: Sequence[Group]) -> dict[int, int]:
        """Returns the state of each asked problem by its index in this rank's share."""
        right: dict[int, list[bool]] = {}
        for index, group in zip(indices, groups, strict=True):
            successes = group.rewards(self.success_key) > self.success_above
            right.setdefault(self._share.index(index), []).extend(successes.tolist())
        return {index: RIGHT if all(of) else MIXED if any(of) else WRONG for index, of in right.items()}


def _transitions(counts: Tensor) -> Tensor:
    """Returns (N, 3, 3) the mean of P, [to, from], from Dirichlet counts of the same shape."""
    return counts / counts.sum(1, keepdim=True)
