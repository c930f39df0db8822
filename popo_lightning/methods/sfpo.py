"""SFPO: fast steps on one batch, a step back towards the start, and a slow step."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

import lightning as L
import torch

from popo_lightning.core.bounds import above, at_least, within
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.ranks import all_reduce
from popo_lightning.core.run_data import run_data
from popo_lightning.model.policy_model import policy_of
from popo_lightning.proximal.kept_weights import Weights, refuse_sharded, snapshot, trainable_parameters
from popo_lightning.proximal.parameter_hook import ParameterHook


class SlowFastPolicy(ParameterHook):
    """SFPO: fast passes over the batch, an interpolation back to the start, and one slow pass (2510.04072).

    Sources: arXiv 2510.04072 and github.com/Urheen/SFPO. With data.ppo_epochs K + 1, an iteration's weights move from
    theta0 to thetaK in K passes, are set to

        theta = theta0 + interpolation (thetaK - theta0)

    and take the last pass there. The optimizer's state is not rewound. Once the entropy of the last iteration is at
    least ``z_threshold`` standard deviations above the mean of the last ``entropy_window`` iterations, itself included,
    SFPO stops for good. The minibatches of all passes but the first are then emptied, which takes no step, and the rest
    is plain GRPO. With data.ppo_epochs 1 it is GRPO from the beginning. Stored: theta0 during an iteration, and a
    window of entropies. Extra passes: K training passes, no rollouts.

    Deviations: the entropy is the mean over tokens of all steps of an iteration. A learning-rate scheduler advances
    with every optimizer step (theirs once per iteration), so it runs K + 1 times as fast before the stop.

    Args:
        interpolation: Fraction of the way from theta0 to thetaK that is kept: 1 continues from thetaK, 0 from theta0.
            Their scripts use 0.8, and 0.9 for one model.
        entropy_window: Number of latest iterations whose entropies are compared. SFPO cannot stop before that many.
        z_threshold: Standard deviations above the mean at which SFPO stops; null never stops it.
    """

    state = ("start", "entropies", "stopped", "_entropy_sum", "_tokens")

    def __init__(self, interpolation: float = 0.8, entropy_window: int = 30, z_threshold: float | None = 1.0) -> None:
        self.interpolation = within("SlowFastPolicy.interpolation", interpolation, 0, 1, "0.8")
        self.entropy_window = at_least("SlowFastPolicy.entropy_window", entropy_window, 2, ", such as 30")
        self.z_threshold = None if z_threshold is None else above("SlowFastPolicy.z_threshold", z_threshold, 0, "1.0")
        self.start: Weights | None = None  # theta0, until the weights are interpolated
        self.entropies: deque[float] = deque(maxlen=self.entropy_window)  # mean entropies of the last iterations
        self.stopped = False
        self._entropy_sum = self._tokens = 0.0  # of the present iteration

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses weights that are split over ranks."""
        refuse_sharded(trainer, "parameter_hook SlowFastPolicy")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """Keeps theta0 at the iteration's start, and interpolates the weights before the last pass."""
        assert isinstance(batch, Minibatch)
        data = run_data(trainer)
        if data.ppo_epochs == 1:
            return
        if batch.index == 0 and self.stopped:
            for later in data.pending:
                if later.index >= data.minibatches:
                    later.groups = []
        elif batch.index == 0:
            self.start = snapshot(policy_of(pl_module).model)
        elif batch.index == (data.ppo_epochs - 1) * data.minibatches and self.start is not None:
            interpolate_back(self.start, policy_of(pl_module).model, self.interpolation)
            self.start = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Sums entropies, and decides after an iteration's last step whether SFPO stops."""
        if self.stopped or self.z_threshold is None:
            return
        if not outputs.get("skipped"):  # a step that was not finite has no entropy
            # Summed over all ranks: they must stop together, and a checkpoint keeps rank 0's numbers.
            self._entropy_sum += all_reduce(trainer, outputs["tokens"].entropy, "sum")
            self._tokens += all_reduce(trainer, outputs["tokens"].count, "sum")
        data = run_data(trainer)
        if batch.index == data.steps - 1:
            if self._tokens:
                self.entropies.append(self._entropy_sum / self._tokens)
                self.stopped = self._rises(self.z_threshold)
            self._entropy_sum = self._tokens = 0.0

    def _rises(self, threshold: float) -> bool:
        if len(self.entropies) < self.entropy_window:
            return False
        spread = statistics.pstdev(self.entropies) + 1e-9
        return (self.entropies[-1] - statistics.fmean(self.entropies)) / spread >= threshold


@torch.no_grad()
def interpolate_back(start: Weights, model: torch.nn.Module, interpolation: float) -> None:
    """Sets the weights to start + interpolation (weights - start), in place."""
    for name, parameter in trainable_parameters(model).items():
        parameter.copy_(start[name].to(parameter.device).lerp(parameter, interpolation))
