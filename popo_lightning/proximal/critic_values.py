"""The critic's values at the start of an iteration; the critic's clip measures movement from them."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import Tensor

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.run_data import run_data
from popo_lightning.model.policy_model import PolicyModel, policy_of


class CriticValues(L.Callback):
    """Records values for all minibatches before the first step; without a critic it does nothing.

    Advantages and returns of an iteration then come from one value function, as PPO's do (1707.06347).
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """Records the values before the first minibatch of an iteration."""
        assert isinstance(batch, Minibatch)
        policy = policy_of(pl_module)
        if policy.critic is None or batch.index:
            return
        data = run_data(trainer)
        with data.clock.measure("values"):
            self.attach([batch, *data.pending], policy)

    def attach(self, minibatches: Sequence[Minibatch], policy: PolicyModel) -> None:
        """Records the values of all minibatches of an iteration; see :meth:`ProximalPolicy.attach`."""
        found: dict[int, dict[str, list[Tensor]]] = {}
        for minibatch in minibatches:
            if minibatch.index_in_epoch not in found:  # later epochs use the same rows
                found[minibatch.index_in_epoch] = policy.estimates(minibatch)
            minibatch.recorded |= found[minibatch.index_in_epoch]
        if of_critic := [each.of_critic for each in minibatches if each.of_critic is not None]:
            self.attach(of_critic, policy)
