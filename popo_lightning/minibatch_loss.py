"""The losses of one minibatch, micro-batch by micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from popo_lightning.minibatch import Minibatch
from popo_lightning.objectives import Objective, ObjectiveInputs, TokenStatistics
from popo_lightning.padded_rows import PaddedRows, proximal_logprobs


@dataclass
class MinibatchLoss:
    """Adds up what a minibatch's rows cost, and keeps the numbers of its tokens for the log.

    Args:
        policy: The PolicyModule that scores rows.
        objective: For this minibatch.
        minibatch: Which one.
        size: Denominator of the objective, over micro-batches and ranks.
        tokens: Denominator of the value loss.
    """

    policy: Any
    objective: Objective
    minibatch: Minibatch
    size: float
    tokens: float
    loss: float = 0.0
    value_loss: float = 0.0
    statistics: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, part: PaddedRows) -> Tensor:
        """The loss of some rows, with gradient; their sum over the minibatch is its mean."""
        logp, entropy = self.policy(part)
        loss, found = self.objective(self._inputs(part, logp, entropy), self.size)
        self.loss += float(loss.detach())
        self.statistics.append(self._tokens(part, logp.detach(), entropy.detach(), found))
        if self.policy.critic is None:
            return loss
        values = self.policy.value_model(part)
        value_loss: Tensor = self.policy.critic.loss(values, part.values, part.returns, part.mask, self.tokens)
        self.value_loss += float(value_loss.detach())
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

    def _tokens(self, part: PaddedRows, logp: Tensor, entropy: Tensor, found: TokenStatistics) -> dict[str, Tensor]:
        width = part.mask.shape[1]
        # What engine and trainer differ by shows on fresh rows, under the policy that the iteration began with.
        start = logp if self.minibatch.index == 0 else part.prox_logp if self.minibatch.prox_is_start else None
        gap = torch.full_like(logp, torch.nan) if start is None else start - part.behave_logp
        tokens = {
            "ratio": found.ratio,
            "clipped": found.clipped,
            "weight_raw": found.weight_raw,
            "weight": found.weight,
            "entropy": entropy,
            "gap": gap,
            "fresh": part.fresh[:, None].expand(-1, width),
            "age": part.age[:, None].expand(-1, width),
        }
        return {name: value[part.mask].cpu() for name, value in tokens.items()}

    def outputs(self) -> dict[str, Any]:
        """What a training step returns of it."""
        found: dict[str, Any] = {"tokens": self.statistics, "mean_loss": self.loss, "region": self.objective.report()}
        return found if self.policy.critic is None else found | {"value_loss": self.value_loss}
