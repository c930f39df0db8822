"""The critic's values at the start of an iteration, from which its clip measures movement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor

from popo_lightning.core.minibatch import Minibatch


class CriticValues(L.Callback):
    """Records values for all minibatches before the first step; without a critic it does nothing.

    Advantages and returns of an iteration then come from one value function, as PPO's do (1707.06347).
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first minibatch of an iteration."""
        assert isinstance(batch, Minibatch)
        if pl_module.critic is None or batch.index:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with data.clock.measure("values"):
            self.attach([batch, *data.pending], pl_module)

    def attach(self, minibatches: Sequence[Minibatch], policy: Any) -> None:
        """Values of all minibatches of an iteration; see :meth:`ProximalPolicy.attach`."""
        found: dict[int, list[Tensor]] = {}
        for minibatch in minibatches:
            if minibatch.part not in found:  # later epochs use the same rows
                found[minibatch.part] = policy.values(minibatch)
            minibatch.values = found[minibatch.part]
