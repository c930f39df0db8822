"""The proximal policy: the centre of the trust region during an iteration."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from popo_lightning.core.minibatch import Minibatch


class ProximalPolicy(L.Callback):
    """Slot: gives minibatches their proximal log-probs.

    A minibatch without them takes those of its own forward pass, which is correct as long as no step precedes it.

    Attributes:
        prox_differs_on_fresh: Whether prox differs from behave on rows sampled in this iteration, so that the behaviour
            weight must also correct them.
    """

    prox_differs_on_fresh = False


class ProximalSnapshot(ProximalPolicy):
    """Log-probs under the weights at the start of the iteration, for fresh and replayed rows alike.

    It does not copy the weights. It computes the log-probs of the rows that will need them before the first optimizer
    step. The first minibatch needs none, because its own forward pass runs on those weights. The behaviour log-probs
    recorded at sampling stay unchanged (decoupled PPO, 2110.00641; POPO, 2606.01281).

    Args:
        recompute_fresh: true recomputes the log-probs of rows sampled in this iteration. false takes the engine's,
            which saves a forward pass and is correct as far as engine and policy agree: 1e-6 in float32 with vLLM. With
            bfloat16 leave it true. With false, `engine/logp_gap_mean` measures the agreement on the first minibatch.
    """

    def __init__(self, recompute_fresh: bool = True) -> None:
        self.recompute_fresh = recompute_fresh

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first minibatch of an iteration, computes those of the others."""
        assert isinstance(batch, Minibatch)
        if batch.index == 0:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            with data.clock.measure("prox"):
                found: dict[int, list[Tensor]] = {}
                # the first minibatch too where a rule asks for prox before the forward pass that would give it
                todo = [batch, *data.pending] if pl_module.advantage.needs_prox else data.pending
                for later in todo:
                    if later.part not in found:  # later epochs use the same rows
                        found[later.part] = self._logprobs(later, pl_module)
                    later.prox_logp, later.prox_is_start = found[later.part], self.recompute_fresh

    def _logprobs(self, minibatch: Minibatch, policy: Any) -> list[Tensor]:
        """(T,) of every row."""
        if self.recompute_fresh:
            found: list[Tensor] = policy.logprobs(minibatch)
            return found
        ages = [{minibatch.version - group.version_of(r) for r in group.responses} for group in minibatch.groups]
        old = [group for group, age in zip(minibatch.groups, ages, strict=True) if age != {0}]
        computed = iter(policy.logprobs(Minibatch(old, minibatch.version, minibatch.index)))
        return [
            response.behave_logp if age == {0} else next(computed)
            for group, age in zip(minibatch.groups, ages, strict=True)
            for response in group.responses
        ]
