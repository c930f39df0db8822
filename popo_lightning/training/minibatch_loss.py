"""The loss of one minibatch, from the outputs of its micro-batches' forward passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NotRequired, TypedDict

from torch import Tensor

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.critic import Critic
from popo_lightning.model.padded_rows import PaddedRows, PassOutputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.without_advantage import moves_by_advantage_alone
from popo_lightning.training.token_sums import TokenSums


class LossOutputs(TypedDict):
    """The part of :class:`StepOutputs` that is known once the passes are done."""

    tokens: TokenSums
    mean_loss: float
    region: dict[str, float]
    value_loss: NotRequired[float]


class StepOutputs(LossOutputs):
    """What a training step returns, and callbacks get at its end; see :meth:`PolicyModule.training_step`."""

    grad_norm: float
    stepped: bool
    skipped: bool


@dataclass
class MinibatchLoss:
    """Sums the losses of a minibatch's rows, and the statistics of its tokens for the log.

    Everything stays on the device until :meth:`outputs`, because waiting after each micro-batch leaves a GPU idle.

    Args:
        objective: Objective of this minibatch.
        critic: The critic's settings, or None.
        minibatch: The minibatch.
        size: Denominator of the objective, over micro-batches and ranks.
        tokens: Denominator of the value loss.
        running_std: (heads,) running standard deviations of the value model, if its head learns one.

    Attributes:
        std_sum: (heads,) sum of the tokens' standard deviations so far; None if the head learns none.
    """

    objective: Objective
    critic: Critic | None
    minibatch: Minibatch
    size: float
    tokens: float
    running_std: Tensor | None = None
    loss: float | Tensor = 0.0
    value_loss: float | Tensor = 0.0
    std_sum: Tensor | None = None
    sums: TokenSums = field(default_factory=TokenSums)

    def is_silent(self, rows: PaddedRows) -> bool:
        """Returns whether the loss of some rows has no gradient: no advantage, and nothing else that moves the policy.

        Args:
            rows: Rows on the CPU.
        """
        return not bool(rows.columns["advantages"].any()) and self._needs_advantage

    @cached_property
    def _needs_advantage(self) -> bool:
        return self.critic is None and moves_by_advantage_alone(self.objective, self.minibatch.version)

    def add(self, rows: PaddedRows, found: PassOutputs) -> Tensor:
        """Returns the loss of some rows, with gradient. The minibatch's loss is the sum of these.

        Args:
            rows: Rows on the CPU.
            found: Outputs of the policy's pass over them, on its device.
        """
        version = self.minibatch.version
        inputs = found.rows.inputs(found.logp, entropy=found.entropy, ref_logp=found.ref_logp, version=version)
        loss, statistics = self.objective(inputs, self.size)
        self.loss = self.loss + loss.detach().double()
        self.sums.add(rows, statistics, found.entropy.detach(), self._gap(found.rows, found.logp.detach()))
        if self.critic is None:
            return loss
        assert found.values is not None
        return loss + self.add_values(found.rows, found.values)

    def add_values(self, rows: PaddedRows, out: Tensor) -> Tensor:
        """Returns the critic's loss of some rows, with gradient.

        Args:
            rows: Rows on the policy's device.
            out: Output of the value model's pass over them.
        """
        assert self.critic is not None
        of_critic = (out, rows.columns["values"], rows.columns["returns"], rows.mask)
        value_loss = self.critic.loss(*of_critic, self.tokens, self.running_std)
        self.value_loss = self.value_loss + value_loss.detach().double()
        if (std := self.critic.head.std(self.critic.by_head(out.detach()))) is not None:
            added = std[rows.mask].sum(dim=0)
            self.std_sum = added if self.std_sum is None else self.std_sum + added
        return value_loss

    def _gap(self, rows: PaddedRows, logp: Tensor) -> Tensor | None:
        """Returns (R, T) the log-probs at the iteration's start minus behave's: the engine's error on fresh rows."""
        prox = rows.columns.get("prox_logp") if self.minibatch.prox_is_start else None
        start = logp if self.minibatch.index == 0 else prox
        return None if start is None else start - rows.columns["behave_logp"]

    def outputs(self) -> LossOutputs:
        """Returns the training step's outputs. Waits for the device."""
        found: LossOutputs = {"tokens": self.sums, "mean_loss": float(self.loss), "region": self.objective.report()}
        if self.critic is not None:
            found["value_loss"] = float(self.value_loss)
        return found
