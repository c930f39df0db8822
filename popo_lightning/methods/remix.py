"""ReMix (arXiv 2507.06892): recent batches replayed, a scaled clip, a convex KL, and a new base policy."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch
from torch import Tensor

from popo_lightning.core.bounds import above, at_least, one_of, within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.ranks import all_gather_tensors
from popo_lightning.model.policy_model import policy_of
from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio
from popo_lightning.objectives.regularizers import ESTIMATORS, Estimator, Regularizer, kl_loss
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, checked_dual_clip, clipped_surrogate
from popo_lightning.proximal.kept_weights import Weights, refuse_sharded, restore, snapshot
from popo_lightning.proximal.parameter_hook import ParameterHook
from popo_lightning.replay.composer import Composer, Iteration


@dataclass(eq=False)
class ReMixReplay(Composer):
    """ReMix's Mix-PPG: with probability p, data of a recent policy replace new data (arXiv 2507.06892).

    At iteration k, with probability p, the batch is that of pi_{k-i}, with i drawn from those of 1..N that sampled one.
    Otherwise the batch is sampled now and kept for the next N iterations. From iteration ``stop_at`` on, the paper's
    reincarnation point, every batch is on-policy.

    Stored: the groups of the last N iterations, ineffective ones included. Extra passes: none. An iteration that
    replays samples nothing, which is how ReMix saves rollouts: with p = 0.4 and N = 2, a fraction of 1 / (1 + p + p^2)
    = 0.64 of the iterations before ``stop_at`` samples.

    Deviations: the paper does not say whether p holds for a batch or for its parts. ``mix: batch`` is the default
    because only then whole iterations need no rollouts. i is drawn uniformly, which is inferred. An iteration that
    replays stores nothing for later ones, so after N replays in a row there is nothing recent, and the next iteration
    samples.

    The other parts of ReMix are data.ppo_epochs (its update-to-data ratio), ScaledWidth, ConvexKL and the parameter
    hook Reincarnation.

    Args:
        probability: p, the probability of replaying.
        policies: N, the maximum number of policy versions back that a batch may come from.
        stop_at: First iteration from which all are on-policy; null for none.
        mix: batch decides once per iteration, for all ranks alike; group decides for each group, and samples the rest.
    """

    supports_async = False
    state = ("_batches", "_replay")

    probability: float = 0.4
    policies: int = 2
    stop_at: int | None = 50
    mix: Literal["batch", "group"] = "batch"

    def __post_init__(self) -> None:
        within("ReMixReplay.probability", self.probability, 0, 1, "0.4")
        at_least("ReMixReplay.policies", self.policies, 1, ", such as 2")
        if self.stop_at is not None:
            at_least("ReMixReplay.stop_at", self.stop_at, 0, ", or null for none")
        one_of("ReMixReplay.mix", self.mix, ("batch", "group"))
        self._batches: deque[tuple[int, list[Group]]] = deque()  # (iteration that sampled it, its groups)
        self._replay: int | None = None  # iteration whose batch the next one trains on

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns a stored batch, a new batch, or a mixture by group."""
        if self._replay is not None:
            groups = dict(self._batches)[self._replay]
        elif self.mix == "group":
            groups = self._mixed(iteration)
        else:
            groups = self._sample(iteration, iteration.num_problems)
        self._look_ahead(iteration)
        return list(groups)

    def samples_next(self) -> bool:
        """Returns whether no whole batch will be replayed."""
        return self._replay is None

    def _mixed(self, iteration: Iteration) -> list[Group]:
        random = iteration.random("remix")
        stored = [group for _, groups in self._batches for group in groups]
        wanted = sum(random.random() < self.probability for _ in range(iteration.num_problems))
        replayed = random.sample(stored, min(wanted, len(stored)))
        return self._sample(iteration, iteration.num_problems - len(replayed)) + replayed

    def _sample(self, iteration: Iteration, count: int) -> list[Group]:
        fresh = iteration.rollout(count)
        self._batches.append((iteration.version, fresh))
        return fresh

    def _look_ahead(self, iteration: Iteration) -> None:
        """Decides what the next iteration does, so that the engine is not woken if it samples nothing."""
        following = iteration.version + 1
        oldest = following - self.policies if self.stop_at is None or following < self.stop_at else following
        self._batches = deque((version, groups) for version, groups in self._batches if version >= oldest)
        self._replay = None
        if self.mix == "batch":
            # All ranks use rank 0's draws, because rollouts are saved only if all ranks skip them.
            random = iteration.random("remix")
            own = torch.tensor([random.random(), random.random()], dtype=torch.float64)
            coin, place = all_gather_tensors([own])[0][:2].tolist()
            if self._batches and coin < self.probability:
                self._replay = self._batches[int(place * len(self._batches))][0]


class Reincarnation(ParameterHook):
    """ReMix's reincarnation: at a given iteration the reference policy becomes the policy (2507.06892).

    From then on, the KL regularizers hold the policy near that policy instead of the base model. Stored: nothing
    before, one copy of the weights in every checkpoint after. Extra forward passes: none.

    Deviation: ReMix also continues without replayed data from there, which is the composer's part.

    Args:
        iteration: Iteration, counted from 0, before whose first step the reference is replaced. The paper has 50 for
            GRPO, 50 or 100 for PPO.
    """

    state = ("reference",)

    def __init__(self, iteration: int = 50) -> None:
        self.iteration = at_least("Reincarnation.iteration", iteration, 0, ", such as 50")
        self.reference: Weights | None = None  # None until it is replaced

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses, before a model loads, a run whose reference is unused or cannot be replaced."""
        policy = policy_of(pl_module)
        if stage == "fit" and not policy.objective.needs_reference:
            raise SettingError(
                "parameter_hook is Reincarnation, but no term of model.regularizers has a reference to "
                "exchange; add popo_lightning.methods.remix.ConvexKL or KL, or drop the hook"
            )
        if stage == "fit" and policy.lora is not None:
            raise SettingError(
                "parameter_hook is Reincarnation, which exchanges the reference, but with model.lora that is the model "
                "without its adapters; leave one of the two out"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores a resumed run's reference."""
        refuse_sharded(trainer, "parameter_hook Reincarnation")
        if self.reference is not None:
            restore(self.reference, policy_of(pl_module).reference)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """Replaces the reference before the iteration's first step."""
        assert isinstance(batch, Minibatch)
        if batch.index == 0 and batch.version == self.iteration:
            policy = policy_of(pl_module)
            self.reference = snapshot(policy.model)
            restore(self.reference, policy.reference)


class ScaledWidth(TrustRegion):
    """ReMix's trust region: PPO's clip around prox, its width divided by the behavior weight (arXiv 2507.06892).

    The paper clips rho = pi_policy / pi_behave to [w - eps, w + eps], w = pi_prox / pi_behave. That is w times PPO's
    loss of r = pi_policy / pi_prox clipped to [1 - eps / w, 1 + eps / w]: decoupled PPO with this region, and
    TruncatedIS without a cap as the weight. Tokens that were likelier under behave than under prox may move farther. It
    needs the stored behave log-probs. Extra passes: none.

    Deviation: the weight is 1 on fresh rows. If a rule caps or masks the weight, the resulting weight sets the width.

    Args:
        clip: eps, the distance of rho below and above w.
        dual_clip: Upper bound of the ratio r for negative advantages; null for none, as in the paper.
    """

    def __init__(self, clip: float = 0.2, dual_clip: float | None = None) -> None:
        self.clip = above("ScaledWidth.clip", clip, 0, "0.2")
        self.dual_clip = checked_dual_clip("ScaledWidth", dual_clip)

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Applies `clipped_surrogate` with a width for each token."""
        width = self.clip / torch.where(rows.mask.bool(), weight, 1.0)
        ratio = log_ratio(rows.logp, rows.prox_logp.detach(), rows.mask).exp()
        return clipped_surrogate(ratio, rows.advantages, rows.mask, width, width, self.dual_clip)


def base_share(version: int, start: int = 50, interval: int = 10, step: float = 0.1, min_share: float = 0.5) -> float:
    """Returns ReMix's lambda(t): 1 up to `start`, then `step` less every `interval` iterations, down to `min_share`.

    max(1 - step * ceil(max(t - start, 0) / interval), min_share), arXiv 2507.06892. The first decrement comes at once.
    """
    return max(1 - step * math.ceil(max(version - start, 0) / interval), min_share)


@dataclass(eq=False)
class ConvexKL(Regularizer):
    """ReMix's KL-convex constraint: keeps the policy near the base model first, and increasingly near prox.

    Adds coefficient * weight * (lambda KL(policy || reference) + (1 - lambda) KL(policy || prox)) to the loss of a
    token, with lambda = `base_share` of the policy version (arXiv 2507.06892). Extra passes: one of the reference.

    Deviations: coefficient and estimator are not known. Replayed tokens are weighted as by KL. The paper's second
    policy is that of the previous iteration, which is prox if prox is the iteration's start.

    Args:
        coefficient: Coefficient of the penalty.
        estimator: k3 as in GRPO, k2 for the unbiased gradient of the reverse KL, k1 for k1's value with k2's gradient.
        start: Iterations during which lambda stays 1.
        interval: Iterations between decrements of lambda.
        step: Size of a decrement.
        min_share: Minimum of lambda.
    """

    needs_reference = True

    coefficient: float
    estimator: Estimator = "k3"
    start: int = 50
    interval: int = 10
    step: float = 0.1
    min_share: float = 0.5

    def __post_init__(self) -> None:
        at_least("ConvexKL.coefficient", self.coefficient, 0)
        one_of("ConvexKL.estimator", self.estimator, ESTIMATORS)
        at_least("ConvexKL.start", self.start, 0)
        at_least("ConvexKL.interval", self.interval, 1)
        above("ConvexKL.step", self.step, 0, "0.1")
        within("ConvexKL.min_share", self.min_share, 0, 1, "0.5")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
        """Returns coefficient * the mixture of two `kl_loss`."""
        if rows.ref_logp is None:
            raise ValueError("ConvexKL needs the reference log-prob of every token; the caller gave none.")
        share = base_share(rows.version, self.start, self.interval, self.step, self.min_share)
        to_base = kl_loss(rows.logp, rows.ref_logp, self.estimator, rows.mask, weight)
        to_prox = kl_loss(rows.logp, rows.prox_logp, self.estimator, rows.mask, weight)
        return self.coefficient * (share * to_base + (1 - share) * to_prox)
