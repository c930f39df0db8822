"""RAPID: large batches sampled at once and trained on in pieces, with capped importance weights."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from popo_lightning.core.bounds import above, at_least
from popo_lightning.core.groups import Group
from popo_lightning.objectives.behave_clip import sampled_logp
from popo_lightning.objectives.detached_loss import capped_score_loss
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput
from popo_lightning.replay.composer import Composer, Iteration


class CappedImportance(TrustRegion):
    """RAPID's importance sampling: the ratio to the policy that sampled, cut from above (arXiv 2510.03515).

    Loss -sg[min(rho, cap)] A log pi with rho = pi_policy / pi_behave, so `behave_weight` must be NoCorrection.
    `clipped` counts the tokens whose ratio is cut. Needs the stored behave log-probs, no passes.

    Deviations: rho is taken by token (whether the paper's is, could not be read); on fresh rows behave is prox.

    Args:
        cap: Upper bound of the ratio.
    """

    includes_is_weight = True

    def __init__(self, cap: float = 2.0) -> None:
        self.cap = above("CappedImportance.cap", cap, 1, "2.0")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Apply `capped_score_loss` around behave."""
        return capped_score_loss(rows.logp, sampled_logp(rows), rows.advantages, rows.mask, 0.0, self.cap)


class RAPID(Composer):
    """RAPID: H batches are sampled at once, then trained on one by one (arXiv 2510.03515).

    Every H iterations the engine answers H times an iteration's problems with the present weights, in one call; this
    iteration and the next H - 1 train on a batch of them each, without rollouts. The batch of the i-th of these
    iterations is i versions old, which its loss corrects by min(rho, 2): CappedImportance, with behaviour weight One.

    Keeps at most H - 1 batches. No forward pass is added. Rollouts are as many as on-policy, in calls H times as
    large, and the engine is woken and given weights H times less often.

    Deviations: the paper's H and its importance-aware group baseline could not be read; H is a setting, and the
    advantage slot is as elsewhere. Batches are trained on in the order the sampler drew their problems, which is
    random already.

    Args:
        batches: H, iterations to a rollout.
    """

    supports_async = False
    state = ("_waiting",)

    def __init__(self, batches: int = 4) -> None:
        self.batches = int(at_least("RAPID.batches", batches, 1, ", such as 4"))
        self._waiting: deque[Group] = deque()

    def samples_next(self) -> bool:
        """Only once nothing is waiting."""
        return not self._waiting

    def compose(self, iteration: Iteration) -> list[Group]:
        """The next batch."""
        if not self._waiting:
            self._waiting.extend(iteration.rollout(self.batches * iteration.problems))
        return [self._waiting.popleft() for _ in range(min(iteration.problems, len(self._waiting)))]
