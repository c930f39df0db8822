"""AReaL's log-linear proximal policy: interpolates between behave and the policy by version, without a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.policy_model import PolicyModel, policy_of
from popo_lightning.proximal.snapshot import ProximalPolicy


class LogLinear(ProximalPolicy):
    """Interpolates proximal log-probs between behave and the policy (AReaL's loglinear, 2505.24298).

        log prox = log behave + alpha (log policy - log behave)
        alpha = (v_prox - v_behave) / (v_policy - v_behave)

    The versions v are: for the policy, the iteration's version in all its steps; for prox, one less; for behave, the
    version that sampled. A row of age a = v_policy - v_behave therefore has alpha (a - 1) / a: 0, 1/2, 2/3 at ages 1,
    2, 3. A fresh row has alpha 0, so prox is behave. Stored: nothing. Extra forward passes: none; ProximalSnapshot
    takes one for every minibatch but the first.
    """

    prox_is_behave_on_fresh = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses an advantage that needs prox log-probs, which are never computed."""
        advantage = policy_of(pl_module).advantage
        if advantage.needs_prox:
            raise SettingError(
                f"proximal is LogLinear, which computes no prox log-probs, but model.advantage is "
                f"{type(advantage).__name__}, which needs them; use the proximal policy ProximalSnapshot"
            )

    def attach(self, minibatches: Sequence[Minibatch], policy: PolicyModel) -> None:
        """Records every row's alpha."""
        for batch in minibatches:
            ages = [batch.version - group.version_of(one) for group in batch.groups for one in group.responses]
            batch.recorded["prox_alpha"] = [torch.tensor(prox_alpha(age)) for age in ages]


def prox_alpha(age: int) -> float:
    """Returns (v_prox - v_behave) / (v_policy - v_behave), where v_prox is v_policy - 1. Fresh rows have alpha 0.

    Args:
        age: v_policy - v_behave, at least 0.
    """
    return (age - 1) / age if age else 0.0
