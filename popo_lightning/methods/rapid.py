"""RAPID: samples large batches at once and trains on them in pieces, with capped importance weights."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from popo_lightning.core.bounds import above, at_least
from popo_lightning.core.groups import Group
from popo_lightning.objectives.inputs import ObjectiveInputs, sampled_logp
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, capped_score_loss
from popo_lightning.replay.composer import Composer, Iteration


class CappedImportance(TrustRegion):
    """RAPID's importance sampling: the ratio to the sampling policy, capped from above (arXiv 2510.03515).

    Loss -sg[min(rho, cap)] A log pi with rho = pi_policy / pi_behave, so `behave_weight` must be NoCorrection.
    `clipped` counts the tokens whose ratio is capped. It needs the stored behave log-probs. Extra passes: none.

    Deviations: rho is per token (whether the paper's is could not be read). On fresh rows behave is prox.

    Args:
        cap: Upper bound of the ratio.
    """

    includes_is_weight = True

    def __init__(self, cap: float = 2.0) -> None:
        self.cap = above("CappedImportance.cap", cap, 1, "2.0")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Applies `capped_score_loss` around behave."""
        return capped_score_loss(rows.logp, sampled_logp(rows), rows.advantages, rows.mask, 0.0, self.cap)


class RAPID(Composer):
    """RAPID: samples H batches at once, then trains on one per iteration (arXiv 2510.03515).

    Every H iterations the engine answers H times an iteration's problems with the present weights, in one call. This
    iteration and the next H - 1 each train on one of the batches; the latter sample nothing. The batch of the i-th of
    these iterations is i versions old, which its loss corrects by min(rho, 2): use CappedImportance with behavior
    weight NoCorrection.

    Stored: at most H - 1 batches. Extra passes: none. There are as many rollouts as on-policy, in calls H times as
    large; the engine wakes and receives weights H times less often.

    Deviations: the paper's H and its importance-aware group baseline could not be read. H is a setting, and the
    advantage slot is unchanged. Batches are trained on in the order the sampler drew their problems, which is already
    random.

    Args:
        batches: H, iterations per rollout.
    """

    supports_async = False
    state = ("_waiting",)

    def __init__(self, batches: int = 4) -> None:
        self.batches = at_least("RAPID.batches", batches, 1, ", such as 4")
        self._waiting: deque[Group] = deque()

    def samples_next(self) -> bool:
        """Returns whether no batch is waiting."""
        return not self._waiting

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the next batch."""
        if not self._waiting:
            self._waiting.extend(iteration.rollout(self.batches * iteration.num_problems))
        return [self._waiting.popleft() for _ in range(min(iteration.num_problems, len(self._waiting)))]
