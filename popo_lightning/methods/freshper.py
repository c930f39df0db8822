"""FreshPER (arXiv 2604.16918): replay priorities that decay with age, and a clip that rejects diverged responses."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from popo_lightning.core.bounds import above, at_least, one_of, within
from popo_lightning.core.groups import Group
from popo_lightning.objectives.advantages import group_normalized
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.inputs import ObjectiveInputs, sampled_logp, sequence_log_ratio
from popo_lightning.objectives.trust_regions import TrustRegionOutput
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.priorities import draw

# FreshPER adds this to a priority's base, so that every stored group can be drawn.
MIN_BASE = 1e-6


@dataclass(eq=False)
class FreshPER(Composer):
    """Prioritized replay whose priorities decay with age (arXiv 2604.16918; Vision-CAIR/Freshness-Aware-PER).

    A batch is the fresh batch and K batches drawn from the store, without replacement within a batch. Group i has the
    probability

        P(i) = p_i^alpha / sum_j p_j^alpha,   p_i = (base_i + 1e-6) exp(-age_i / tau).

    base is the mean of |R| or of |A| in the group; a priority halves every tau ln 2 versions. The loss of a drawn group
    is multiplied by (N P(i))^-beta, divided by its maximum over the store, which is (min_j P(j) / P(i))^beta. beta
    rises linearly from its initial value to 1. The source's loss is ``FilteredBehaveAligned``: a clip around behave
    without the responses that its ratio filter rejects.

    Stored: the newest ``capacity`` groups, first in, first out, as in the source by default. Extra passes: none; only
    the group's rewards are needed. An iteration trains on K + 1 times as many groups for the same rollouts.

    Deviations: the source stores single trajectories. Here the unit is the group, so ineffective groups, which teach
    nothing, are left out by default. New entries have the priority of their rewards, where the source gives them the
    maximum until they have been trained on. Draws are without replacement; the source's are stratified. The source also
    offers |TD error|, which needs a critic. Its capacity is 50,000 trajectories. How long beta takes is unknown.

    Args:
        replay_batches: K, stored batches per fresh batch.
        base: Base of the priority: advantage or reward, of the component data.effective_key.
        tau: Decay constant in policy versions.
        exponent: alpha; 0 draws uniformly.
        beta: Initial correction for the nonuniform draw; 0 is none, 1 is full.
        beta_iterations: Iterations until beta is 1.
        capacity: Groups kept, per rank.
        effective_only: Store only groups whose rewards differ. Set it to false for an advantage that also learns from
            the others.
    """

    state = ("_groups",)

    replay_batches: int = 1
    base: Literal["advantage", "reward"] = "advantage"
    tau: float = 500.0
    exponent: float = 0.6
    beta: float = 0.4
    beta_iterations: int = 500
    capacity: int = 1024
    effective_only: bool = True

    def __post_init__(self) -> None:
        at_least("FreshPER.replay_batches", self.replay_batches, 1, ", such as 1")
        one_of("FreshPER.base", self.base, ("advantage", "reward"))
        above("FreshPER.tau", self.tau, 0, "500")
        at_least("FreshPER.exponent", self.exponent, 0, ", such as 0.6")
        within("FreshPER.beta", self.beta, 0, 1, "0.4")
        at_least("FreshPER.beta_iterations", self.beta_iterations, 1, ", such as 500")
        at_least("FreshPER.capacity", self.capacity, 1, ", such as 1024")
        self._groups: deque[Group] = deque(maxlen=self.capacity)

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the fresh groups, then the drawn ones. The draw precedes the storing of fresh groups."""
        fresh = iteration.rollout()
        stored = list(filter(iteration.still_effective, self._groups)) if self.effective_only else list(self._groups)
        log_priorities = [self._log_priority(group, iteration) for group in stored]
        replayed: list[Group] = []
        for batch in range(self.replay_batches):
            drawn = draw(log_priorities, iteration.num_problems, iteration.random("freshper", batch))
            replayed += [self._weighted(stored[i], log_priorities[i] - min(log_priorities), iteration) for i in drawn]
        self._groups.extend(iteration.split(fresh)[0] if self.effective_only else fresh)
        return fresh + replayed

    def _log_priority(self, group: Group, iteration: Iteration) -> float:
        """Returns log p^alpha, because p itself would underflow after some thousand versions."""
        rewards = group.rewards(iteration.effective_key)
        values = rewards if self.base == "reward" else group_normalized(rewards[None])[0]
        age = iteration.version - group.version
        return self.exponent * (math.log(float(values.abs().mean()) + MIN_BASE) - age / self.tau)

    def _weighted(self, group: Group, above_least: float, iteration: Iteration) -> Group:
        progress = min(1.0, iteration.version / self.beta_iterations)
        beta = self.beta + (1 - self.beta) * progress
        return replace(group, loss_weight=math.exp(-beta * above_least))


class FilteredBehaveAligned(BehaveAligned):
    """PPO's clip of pi_policy / pi_behave around 1, without responses from which the policy has moved away.

    FreshPER's loss (arXiv 2604.16918; Vision-CAIR/Freshness-Aware-PER). A replayed response is rejected as a whole if
    the geometric mean of its tokens' pi_prox / pi_behave is above `max_ratio`. The clip is that of `BehaveAligned`.
    `behave_weight` must be NoCorrection. It needs the stored behave log-probs and prox. Extra passes: none. `clipped`
    counts the tokens of rejected responses.

    Deviation: the source draws other responses to replace rejected ones before it trains. Here they leave a gap and
    still count in the denominator.

    Args:
        clip_low: Ratios below 1 - clip_low give no further gain.
        clip_high: Ratios above 1 + clip_high give no further gain.
        dual_clip: Upper bound of the ratio for negative advantages; null for none.
        max_ratio: Geometric mean above which a replayed response is rejected.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = 10.0,
        max_ratio: float = 3.0,
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip)
        self.max_ratio = above("FilteredBehaveAligned.max_ratio", max_ratio, 1, "3.0")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Applies PPO's clip around `sampled_logp` to the kept responses; rejected ones have loss 0."""
        found = super().__call__(rows, weight)
        log_mean = sequence_log_ratio(rows.prox_logp.detach(), sampled_logp(rows), rows.mask)
        rejected = (log_mean > math.log(self.max_ratio)) & rows.mask.bool()
        return TrustRegionOutput(torch.where(rejected, 0.0, found.loss), found.ratio, found.clipped | rejected)
