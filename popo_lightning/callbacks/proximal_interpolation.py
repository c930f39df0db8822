"""AReaL's log-linear proximal policy: between behave and the policy, by their versions, without a forward pass."""

from __future__ import annotations

from typing import Any

import lightning as L

from popo_lightning.callbacks.proximal import ProximalPolicy
from popo_lightning.errors import SettingError
from popo_lightning.minibatch import Minibatch


class LogLinear(ProximalPolicy):
    """Proximal log-probs as a point on the line from behave to the policy (AReaL's loglinear, 2505.24298).

        log prox = log behave + alpha (log policy - log behave)
        alpha = (v_prox - v_behave) / (v_policy - v_behave)

    with versions v: that of the iteration's start for prox, the sampling one for behave, and for the policy the start's
    plus the share of the iteration's steps that have been taken. alpha 1 is the policy, 0 is behave; before the first
    step alpha is 1, for fresh rows (0 / 0) too. Fresh rows have alpha 0 afterwards: prox is behave. Stored: nothing.
    Extra forward passes: none, where ProximalSnapshot takes one of every minibatch but the first.

    Deviations: AReaL counts the policy as a whole version further in all steps of an iteration; here the steps count
    one by one, so that the first has prox at the policy, as a recomputation would. A step that was skipped because a
    minibatch had no tokens counts as taken.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuses an advantage that asks for what is never computed."""
        if pl_module.advantage.needs_prox:
            raise SettingError(
                f"proximal is LogLinear, which computes no prox log-probs, but model.advantage is "
                f"{type(pl_module.advantage).__name__}, which needs them; use the proximal policy ProximalSnapshot"
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Alpha of every row."""
        assert isinstance(batch, Minibatch)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        taken = batch.index / data.steps
        ages = [batch.version - group.version_of(response) for group in batch.groups for response in group.responses]
        batch.prox_share = [prox_share(age, taken) for age in ages]


def prox_share(age: int, taken: float) -> float:
    """Alpha: (v_prox - v_behave) / (v_policy - v_behave).

    Args:
        age: v_prox - v_behave.
        taken: v_policy - v_prox, the share of the iteration's steps that were taken.
    """
    return age / (age + taken) if age + taken else 1.0
