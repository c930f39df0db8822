"""PPO-EWMA: the proximal policy is an average of past weights."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from popo_lightning.core.bounds import at_least, one_of
from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.run_data import run_data
from popo_lightning.model.policy_model import PolicyModel, policy_of
from popo_lightning.proximal.kept_weights import Weights, refuse_sharded, restore, snapshot, trainable_parameters
from popo_lightning.proximal.snapshot import ProximalPolicy


class ProximalAverage(ProximalPolicy):
    """Centers the trust region on an exponential average of the weights after every optimizer step (2110.00641).

    Sources: arXiv 2110.00641 and github.com/openai/ppo-ewma. The average starts at the first weights with W = 1. After
    each step

        W' = beta W + 1,   average <- average + (policy - average) / W',   W <- W'

    which is the exact normalized average sum(beta^age weights) / sum(beta^age). Before each minibatch, its rows' prox
    log-probs are computed under the average. A policy near the average has been near it for about ``center_of_mass``
    steps, regardless of an iteration's length, so the batch size may change (`for_smaller_batch`).

    prox is not behave even on fresh rows, so the behavior weight must correct them: use TruncatedIS with correct_fresh
    true, and a cap of 100 as in their code. Stored: one float32 copy of the trained weights, in the checkpoint as well.
    Extra forward passes: one per minibatch, instead of the usual pass at an iteration's start.

    Deviations: their cap holds for policy over behave and keeps the gradient of capped tokens; TruncatedIS caps prox
    over behave. Before the first step of a run, prox is the first weights. The paper trains one epoch per batch.

    Args:
        center_of_mass: Mean age of the average in optimizer steps: beta = 1 - 1 / (center_of_mass + 1), 0.889 for 8.
    """

    prox_differs_on_fresh = True
    state = ("average", "mass")

    def __init__(self, center_of_mass: float = 8.0) -> None:
        self.beta = 1 - 1 / (at_least("ProximalAverage.center_of_mass", center_of_mass, 0, ", such as 8") + 1)
        self.average: Weights | None = None
        self.mass = 1.0  # W: sum of the average's coefficients; the newest weights have 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the average at the present weights, or continues a checkpoint's average."""
        refuse_sharded(trainer, "proximal ProximalAverage")
        start = {name: weight.float() for name, weight in snapshot(policy_of(pl_module).model).items()}
        if self.average is None:
            self.average, self.mass = start, 1.0
        self.average = {name: self.average[name].to(weight.device) for name, weight in start.items()}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """Records the log-probs of the minibatch's rows under the average."""
        assert isinstance(batch, Minibatch) and self.average is not None
        data = run_data(trainer)
        with data.clock.measure("prox"):
            batch.recorded["prox_logp"] = under(self.average, policy_of(pl_module), batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Adds the weights after the step to the average."""
        if outputs["stepped"]:
            self.add(policy_of(pl_module).model)

    @torch.no_grad()
    def add(self, model: torch.nn.Module) -> None:
        """Adds the newest weights to the average."""
        assert self.average is not None
        self.mass = self.beta * self.mass + 1
        for name, parameter in trainable_parameters(model).items():
            self.average[name].lerp_(parameter.float(), 1 / self.mass)


def under(weights: Weights, policy: PolicyModel, minibatch: Minibatch) -> list[Tensor]:
    """Returns the log-probs of a minibatch's rows under other weights, which it loads into the module meanwhile."""
    own = snapshot(policy.model)
    restore(weights, policy.model)
    try:
        return policy.logprobs(minibatch)
    finally:
        restore(own, policy.model)


def for_smaller_batch(
    learning_rate: float, center_of_mass: float, shrink: float, optimizer: Literal["adam", "sgd"] = "adam"
) -> tuple[float, float]:
    """Returns settings with which PPO-EWMA learns from ``shrink`` times smaller batches as before (2110.00641).

    Per response, the policy then moves and is held back as with the large batches; there are ``shrink`` times as many
    optimizer steps. The rule fails if batches are so small that Adam's own averages cover too few responses.

    Args:
        learning_rate: Learning rate with the present batch.
        center_of_mass: ProximalAverage's center_of_mass with the present batch.
        shrink: Present batch size divided by the new one; below 1 for a larger batch.
        optimizer: "adam" (also AdamW) scales the learning rate with the root of the batch size, "sgd" with the size.

    Returns:
        (learning_rate, center_of_mass) for the new size.
    """
    if not 0 < shrink < math.inf:
        raise SettingError(f"shrink is {shrink}; give how many times smaller the batch is to be, such as 4")
    one_of("optimizer", optimizer, ("adam", "sgd"))
    return learning_rate / (math.sqrt(shrink) if optimizer == "adam" else shrink), center_of_mass * shrink
