"""The losses of one minibatch, micro-batch by micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.padded_rows import PaddedRows, proximal_logprobs
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.without_advantage import moves_by_advantage_alone
from popo_lightning.training.token_sums import TokenSums


@dataclass
class MinibatchLoss:
    """Sums the losses of a minibatch's rows, and the statistics of its tokens for the log.

    Everything stays on the device until :meth:`outputs`, because waiting after each micro-batch leaves a GPU idle.

    Args:
        policy: The PolicyModule that scores rows.
        objective: Objective of this minibatch.
        minibatch: The minibatch.
        size: Denominator of the objective, over micro-batches and ranks.
        tokens: Denominator of the value loss.
    """

    policy: Any
    objective: Objective
    minibatch: Minibatch
    size: float
    tokens: float
    loss: float | Tensor = 0.0
    value_loss: float | Tensor = 0.0
    sums: TokenSums = field(default_factory=TokenSums)

    def is_silent(self, part: PaddedRows) -> bool:
        """Whether the loss of some rows has no gradient: they have no advantage, and nothing else moves the policy.

        Args:
            part: On the CPU.
        """
        return not bool(part.advantages.any()) and self._needs_advantage

    @cached_property
    def _needs_advantage(self) -> bool:
        return self.policy.critic is None and moves_by_advantage_alone(self.objective, self.minibatch.version)

    def add(self, part: PaddedRows) -> Tensor:
        """The loss of some rows, with gradient; their sum over the minibatch is its mean.

        Args:
            part: On the CPU.
        """
        rows = part.to(self.policy.device)
        logp, entropy = self.policy(rows)
        loss, found = self.objective(self._inputs(rows, logp, entropy), self.size)
        self.loss = self.loss + loss.detach().double()
        self.sums.add(part, found, entropy.detach(), self._gap(rows, logp.detach()))
        if self.policy.critic is None:
            return loss
        values = self.policy.value_model(rows)
        value_loss: Tensor = self.policy.critic.loss(values, rows.values, rows.returns, rows.mask, self.tokens)
        self.value_loss = self.value_loss + value_loss.detach().double()
        return loss + value_loss

    def _inputs(self, part: PaddedRows, logp: Tensor, entropy: Tensor) -> ObjectiveInputs:
        return ObjectiveInputs(
            logp=logp,
            prox_logp=proximal_logprobs(part, logp.detach()),
            behave_logp=part.behave_logp,
            advantages=part.advantages,
            mask=part.mask,
            fresh=part.fresh,
            entropy=entropy,
            ref_logp=self.policy.reference_logprobs(part),
            version=self.minibatch.version,
            loss_weight=part.loss_weight,
        )

    def _gap(self, part: PaddedRows, logp: Tensor) -> Tensor | None:
        """(R, T) what engine and trainer differ by: on fresh rows, under the policy that the iteration began with."""
        start = logp if self.minibatch.index == 0 else part.prox_logp if self.minibatch.prox_is_start else None
        return None if start is None else start - part.behave_logp

    def outputs(self) -> dict[str, Any]:
        """What a training step returns of it. Waits for the device."""
        found: dict[str, Any] = {"tokens": self.sums, "mean_loss": float(self.loss), "region": self.objective.report()}
        return found if self.policy.critic is None else found | {"value_loss": float(self.value_loss)}
