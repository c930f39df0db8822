"""The proximal policy: the centre of the trust region during an iteration."""

from __future__ import annotations

from collections.abc import Sequence
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

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first step of an iteration."""
        assert isinstance(batch, Minibatch)
        if not batch.index:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            with data.clock.measure("prox"):
                self.attach([batch, *data.pending], pl_module)

    def attach(self, minibatches: Sequence[Minibatch], policy: Any) -> None:
        """Gives an iteration's minibatches what their prox log-probs follow from; this one leaves them without.

        Args:
            minibatches: All of the iteration, in order. Several epochs share one ``part``.
            policy: The PolicyModule, with the weights that the iteration begins with.
        """


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

    def attach(self, minibatches: Sequence[Minibatch], policy: Any) -> None:
        """Log-probs of all minibatches but the first."""
        # the first too where a rule asks for prox before the forward pass that would give it
        todo = minibatches if policy.advantage.needs_prox else minibatches[1:]
        found: dict[int, list[Tensor]] = {}
        for minibatch in todo:
            if minibatch.part not in found:  # later epochs use the same rows
                found[minibatch.part] = self._logprobs(minibatch, policy)
            minibatch.prox_logp, minibatch.prox_is_start = found[minibatch.part], self.recompute_fresh

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
