"""The proximal policy: the center of the trust region during an iteration."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import Tensor

from popo_lightning.core.kept_state import KeepsState
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.run_data import run_data
from popo_lightning.model.policy_model import PolicyModel, policy_of


class ProximalPolicy(KeepsState, L.Callback):
    """Slot: gives minibatches their proximal log-probs.

    A minibatch without them uses those of its own forward pass, which is correct as long as no step precedes it. A
    checkpoint keeps the attributes that ``state`` names.

    Attributes:
        prox_differs_on_fresh: Whether prox differs from behave on rows sampled in this iteration, so that the behavior
            weight must also correct them.
        prox_is_behave_on_fresh: Whether the prox log-probs of those rows are the ones that the engine recorded.
    """

    transient = ("log", "log_dict")  # Lightning sets them during a hook

    prox_differs_on_fresh = False
    prox_is_behave_on_fresh = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """Attaches prox log-probs before the first step of an iteration."""
        assert isinstance(batch, Minibatch)
        if not batch.index:
            data = run_data(trainer)
            with data.clock.measure("prox"):
                self.attach([batch, *data.pending], policy_of(pl_module))

    def attach(self, minibatches: Sequence[Minibatch], policy: PolicyModel) -> None:
        """Attaches to an iteration's minibatches the data for their prox log-probs. The base class attaches none.

        Args:
            minibatches: All minibatches of the iteration, in order. Those with one ``index_in_epoch`` have the same
                groups.
            policy: The PolicyModule, with the weights at the iteration's start.
        """


class ProximalSnapshot(ProximalPolicy):
    """Log-probs under the weights at the start of the iteration, for fresh and replayed rows alike.

    It does not copy the weights. It computes the log-probs of the rows that will need them before the first optimizer
    step. The first minibatch needs none, because its own forward pass runs on those weights. The behavior log-probs
    recorded at sampling stay unchanged (decoupled PPO, 2110.00641; POPO, 2606.01281).

    Args:
        recompute_fresh: true recomputes the log-probs of rows sampled in this iteration. false takes the engine's,
            which saves a forward pass and is correct as far as engine and policy agree: 1e-6 in float32 with vLLM. With
            bfloat16 leave it true. With false, `engine/logp_gap_mean` measures the agreement on the first minibatch.
    """

    def __init__(self, recompute_fresh: bool = True) -> None:
        self.recompute_fresh = recompute_fresh
        self.prox_is_behave_on_fresh = not recompute_fresh

    def attach(self, minibatches: Sequence[Minibatch], policy: PolicyModel) -> None:
        """Computes the log-probs of all minibatches but the first."""
        # The first needs them too if the advantage reads prox before the forward pass that would give it.
        todo = minibatches if policy.advantage.needs_prox else minibatches[1:]
        found: dict[int, list[Tensor]] = {}
        for minibatch in todo:
            if minibatch.index_in_epoch not in found:  # later epochs use the same rows
                found[minibatch.index_in_epoch] = self._logprobs(minibatch, policy)
            minibatch.recorded["prox_logp"] = found[minibatch.index_in_epoch]
            minibatch.prox_is_start = self.recompute_fresh

    def _logprobs(self, minibatch: Minibatch, policy: PolicyModel) -> list[Tensor]:
        """Returns (T,) the prox log-probs of every row."""
        if self.recompute_fresh:
            return policy.logprobs(minibatch)
        ages = [{minibatch.version - group.version_of(r) for r in group.responses} for group in minibatch.groups]
        old = [group for group, age in zip(minibatch.groups, ages, strict=True) if age != {0}]
        computed = iter(policy.logprobs(Minibatch(old, minibatch.version, minibatch.index)))
        return [
            response.behave_logp if age == {0} else next(computed)
            for group, age in zip(minibatch.groups, ages, strict=True)
            for response in group.responses
        ]
