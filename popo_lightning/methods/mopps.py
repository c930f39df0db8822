"""MoPPS: chooses problems by a posterior of their success rates, before it samples any response."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from popo_lightning.core.bounds import at_least, within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.tasks.samplers import PromptSampler


@dataclass(eq=False)
class MoPPS(PromptSampler):
    """Asks problems whose success rate, drawn from a Beta posterior, is nearest to one half (2507.04632).

    Sources: arXiv 2507.04632 and github.com/thu-rllab/MoPPS. Each draw proposes ``candidates * count`` problems at
    random, draws gamma ~ Beta(alpha, beta) for each (Thompson sampling) and keeps the ``count`` with the smallest
    (gamma - target)^2. Once the K responses of a problem are graded, with s of them correct,

        alpha <- discount * alpha + (1 - discount) * prior_alpha + s
        beta  <- discount * beta  + (1 - discount) * prior_beta  + K - s

    so that older observations count less, because the policy has changed. Stored: two numbers for each problem that was
    ever asked. Extra forward passes and rollouts: none.

    Deviations: every rank proposes from its own share of the problems (index % ranks == rank) and keeps posteriors for
    those alone, so ranks need no communication and no two ask the same problem. Candidates that are not kept go back; a
    pass over the data would not meet them again before its end. The posterior has no warm start from offline samples.
    Draws of one iteration (dynamic sampling asks again) may repeat a problem; one draw never does.

    Args:
        candidates: Problems proposed per problem asked. The paper uses 8, and 16 for math.
        discount: Fraction of a posterior that remains when its problem is seen again. 1 forgets nothing (the paper's
            value for math); the paper uses 0.5 elsewhere.
        target: Target success rate.
        target_range: Minimum and maximum gamma. Candidates inside are asked in random order; if they are too few, the
            nearest to the range follow. The paper's variant has [0.3, 0.7]. null uses target.
        prior: alpha and beta of a problem never seen.
        success_key: Reward component that measures success.
        success_above: A response is correct if that component is greater than this.
    """

    state = ("draws", "posterior")

    candidates: int = 8
    discount: float = 0.5
    target: float = 0.5
    target_range: tuple[float, float] | None = None
    prior: tuple[float, float] = (1.0, 1.0)
    success_key: str = "acc"
    success_above: float = 0.5

    def __post_init__(self) -> None:
        at_least("MoPPS.candidates", self.candidates, 1, " for each problem asked")
        within("MoPPS.discount", self.discount, 0, 1, "0.5")
        within("MoPPS.target", self.target, 0, 1, "0.5")
        if self.target_range is not None and not 0 <= self.target_range[0] < self.target_range[1] <= 1:
            raise SettingError(
                f"MoPPS.target_range is {list(self.target_range)}; give two rising success rates, such as [0.3, 0.7]"
            )
        if min(self.prior) <= 0:
            raise SettingError(f"MoPPS.prior is {list(self.prior)}; both numbers of a Beta distribution are above 0")
        self.posterior: dict[int, tuple[float, float]] = {}  # by problem index, for the problems seen so far
        self.draws = 0  # calls of draw; each has its own generator

    def start(self, num_problems: int, seed: int, rank: int, world_size: int) -> None:
        """Begins without any knowledge."""
        super().start(num_problems, seed, rank, world_size)
        self.posterior, self.draws = {}, 0
        self._share = self.own_share()

    def draw(self, count: int) -> list[int]:
        """Returns the best of a random choice of problems. A count above the share first takes whole passes over it."""
        generator = random.Random(f"{self.seed}/{self.rank}/mopps/{self.draws}")
        self.draws += 1
        passes, count = divmod(count, len(self._share))
        proposed = generator.sample(self._share, min(self.candidates * count, len(self._share)))
        distance = {index: self._distance(generator.betavariate(*self.belief(index))) for index in proposed}
        return list(self._share) * passes + sorted(proposed, key=distance.__getitem__)[:count]

    def belief(self, index: int) -> tuple[float, float]:
        """Returns alpha and beta of a problem's success rate."""
        return self.posterior.get(index, self.prior)

    def _distance(self, gamma: float) -> float:
        if self.target_range is None:
            return (gamma - self.target) ** 2
        return max(self.target_range[0] - gamma, gamma - self.target_range[1], 0.0)

    def observe(self, indices: Sequence[int], groups: Sequence[Group]) -> None:
        """Updates the posteriors of the problems that were asked."""
        for index, group in zip(indices, groups, strict=True):
            right = int((group.rewards(self.success_key) > self.success_above).sum())
            seen = (right, len(group.responses) - right)
            old = self.belief(index)
            alpha, beta = (
                self.discount * was + (1 - self.discount) * prior + new
                for was, prior, new in zip(old, self.prior, seen, strict=True)
            )
            self.posterior[index] = (alpha, beta)
