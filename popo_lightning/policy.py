"""The policy: a language model and the objective it is trained on. It calls no engine, task or buffer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from popo_lightning.callbacks.supplied import supply
from popo_lightning.core.bounds import above, at_least, one_of
from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch, Row, response_lengths
from popo_lightning.core.ranks import all_reduce
from popo_lightning.core.trainer_callbacks import callbacks_of
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model import policy_checkpoint
from popo_lightning.model.critic import Critic, check_critic
from popo_lightning.model.critic_target import follow_critic
from popo_lightning.model.lora import Lora
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.objectives.advantages import Advantage, GroupNormalized, check_weight
from popo_lightning.objectives.aggregations import Aggregation, TokenMean
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import Regularizer
from popo_lightning.objectives.rule_states import RuleStates
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion
from popo_lightning.objectives.weights import BehaveWeight, TruncatedIS
from popo_lightning.training.finite_steps import FiniteSteps
from popo_lightning.training.gradients import add_up_critic_gradients, add_up_gradients, clip_gradients, free_gradients
from popo_lightning.training.minibatch_loss import LossOutputs, MinibatchLoss, StepOutputs
from popo_lightning.training.minibatch_targets import MinibatchTargets, minibatch_targets, whitened_over_ranks
from popo_lightning.training.optimizers import check_state, clear_unstepped, fuse, group_settings, made, obey
from popo_lightning.training.whole_minibatch import of_whole_minibatch


class PolicyModule(PolicyModel):
    """A causal language model trained on groups of graded responses.

    Optimization is manual, with exactly one optimizer step per training step. A token budget splits a minibatch into a
    varying number of micro-batches; automatic optimization would make each of them a training step. Checkpoints and
    schedulers therefore keep their Lightning meaning, and this class clips the gradients itself.

    Args:
        path: Model folder or hub id, as transformers and vLLM load it. Leave it out to use warm_start.
        warm_start: Recipe of a tiny policy for the embedded tasks: shipped with the package, or built on first use.
        advantage: Turns the rewards of a group into advantages.
        behave_weight: Corrects for the policy that sampled the tokens, by pi_prox / pi_behave.
        trust_region: Bounds how far a step moves the policy from prox.
        regularizers: Additional loss terms; none by default.
        aggregation: Reduces the token losses to one loss.
        lora: Train low-rank adapters beside frozen weights; null trains all weights.
        critic: A value model beside the policy, for advantages that need one.
        optimizer: Optimizer over the policy's parameters.
        lr_scheduler: Learning-rate scheduler, stepped after every optimizer step.
        max_grad_norm: Gradient-clipping norm; null disables clipping.
        max_skipped_steps: Number of consecutive skipped steps that ends the run. All ranks skip a step whose loss or
            gradient norm is not finite.
        micro_batch_tokens: Padded tokens per forward pass. It bounds memory; the loss does not depend on it.
        shared_prompts: Compute a prompt once for several of its responses where that costs less. The log-probs are
            equal up to rounding. Models with layers that do not attend to all earlier tokens, models that see images,
            and flash attention compute the prompt for each response in any case.
        attention: sdpa, eager, flex_attention, flash_attention_2, flash_attention_3 or a kernel of the hub. null takes
            the fastest exact one: an implementation without padding where prompts can be shared, otherwise sdpa.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        gradient_sync: When sharded models (FSDP2) reduce their gradients over the ranks. step reduces once, after the
            last micro-batch; until then each rank holds all gradients in float32. micro_batch reduces after each
            micro-batch, so a rank holds only its shard, but every micro-batch sends all gradients. DDP always uses
            step, at no extra memory.
        compile_layers: Compile the policy's layers with torch.compile. The start takes a minute or more longer; passes
            are faster.
        freeze_vision: Train the language model only and freeze the vision tower.
        dtype: Type of the weights; adapters are float32 in any case. For bfloat16 computation with float32 weights use
            trainer.precision bf16-mixed. bfloat16 weights take half the memory but lose small updates to rounding.
        temperature: Set from data.temperature.
        reward_key: Reward component to train on.
    """

    def __init__(
        self,
        path: str | None = None,
        warm_start: WarmStart | None = None,
        # The default objects hold settings only and are never changed, so sharing them is safe.
        advantage: Advantage = GroupNormalized(),  # noqa: B008
        behave_weight: BehaveWeight = TruncatedIS(),  # noqa: B008
        trust_region: TrustRegion = PPOClip(),  # noqa: B008
        regularizers: list[Regularizer] | None = None,
        aggregation: Aggregation = TokenMean(),  # noqa: B008
        lora: Lora | None = None,
        critic: Critic | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        max_skipped_steps: int = 3,
        micro_batch_tokens: int = 16384,
        shared_prompts: bool = True,
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        gradient_sync: str = "step",
        compile_layers: bool = False,
        freeze_vision: bool = False,
        dtype: str = "float32",
        temperature: float = 1.0,
        reward_key: str = "score",
    ) -> None:
        super().__init__()
        if path is not None and not path.strip():
            raise SettingError(
                "model.path is empty; give a model folder or hub id, or null and a tiny policy by model.warm_start"
            )
        if (path is None) == (warm_start is None):
            raise SettingError(
                "give either model.path (a model folder or hub id) or model.warm_start (a tiny policy built on first "
                f"use), not {'both; --model.warm_start null drops the second' if path else 'neither'}"
            )
        if max_grad_norm is not None:
            above("model.max_grad_norm", max_grad_norm, 0, "1.0, or null for no clipping")
        one_of("model.dtype", dtype, ("float32", "bfloat16"))
        self.gradient_sync = one_of("model.gradient_sync", gradient_sync, ("step", "micro_batch"))
        check_critic(critic, advantage, dtype, lora is not None)
        check_weight(advantage, behave_weight)
        self.automatic_optimization = False
        self.path = path
        self.warm_start = warm_start
        self.objective = Objective(behave_weight, trust_region, regularizers, aggregation)
        self.advantage = advantage
        self.rules = RuleStates(advantage, self.objective)
        self.lora = lora
        self.critic = critic
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.finite_steps = FiniteSteps(max_skipped_steps)
        self.micro_batch_tokens = at_least("model.micro_batch_tokens", micro_batch_tokens, 1)
        self.shared_prompts = shared_prompts
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.freeze_vision = freeze_vision
        self.weight_dtype: torch.dtype = getattr(torch, dtype)
        self.temperature = temperature
        self.reward_key = reward_key
        self.iteration_metrics = {}

    # -- training ----------------------------------------------------------------------------------------------

    def advantages(self, minibatch: Minibatch) -> list[Tensor]:
        """Returns one tensor per row, () for the whole response or (T,), before whitening and without charges.

        Uses the critic's recorded values; if none are recorded, computes them.

        Args:
            minibatch: Minibatch with the rows.
        """
        return self._targets(minibatch, copy.deepcopy(self.advantage)).advantages

    def _targets(self, minibatch: Minibatch, advantage: Advantage | None = None) -> MinibatchTargets:
        known: Mapping[str, Sequence[Tensor]] = minibatch.recorded
        if self.critic is not None and "values" not in known:
            known = self.estimates(minibatch)
        return minibatch_targets(minibatch, advantage or self.advantage, self.reward_key, self.critic, known)

    def _rows(self, minibatch: Minibatch) -> list[Row]:
        """Returns a minibatch's rows with their advantages and the critic's targets."""
        targets = self._targets(minibatch)
        whitens, advantages = self.advantage.whitens, targets.advantages
        advantages = whitened_over_ranks(self.trainer, advantages) if whitens else advantages
        return minibatch.rows(advantages=minibatch.charged(advantages), **targets.of_critic)

    def training_step(self, minibatch: Minibatch, batch_idx: int) -> StepOutputs:
        """Takes one optimizer step on one minibatch.

        Returns:
            "tokens": TokenSums of its response tokens on this rank, still on the device; "mean_loss", "grad_norm",
            "stepped" (False if no rank had a token to learn from, or the step was skipped), "skipped" (True if it was
            not finite), "region" (the trust region's report); with a critic also "value_loss".

        Raises:
            NotFiniteError: Too many steps in a row were not finite, or the weights no longer are.
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        objective, rows = of_whole_minibatch(self, minibatch, self._rows(minibatch))
        # One denominator for the whole minibatch over all ranks; DDP averages gradients, hence the world size.
        world_size = self.trainer.world_size
        size = all_reduce(self.trainer, objective.aggregation.size(response_lengths(rows)), "sum")
        tokens = all_reduce(self.trainer, minibatch.critic_tokens, "sum")
        running = None if self.critic is None else self.value_model.running_std
        losses = MinibatchLoss(objective, self.critic, minibatch, size / world_size, tokens / world_size, running)
        if (of_critic := minibatch.of_critic) is not None:
            critic_rows = of_critic.rows(**self._targets(of_critic, copy.deepcopy(self.advantage)).of_critic)
            add_up_critic_gradients(self, losses, self._passes(of_critic, critic_rows))
        add_up_gradients(self, losses, self._passes(minibatch, rows))
        norms = self._clip_gradients(minibatch.version) if size else {"grad_norm": float("nan")}
        found = losses.outputs()
        stepped = bool(size) and self._step(optimizer, minibatch, found, norms)
        if stepped and self.critic is not None:
            follow_critic(self, losses.std_sum, tokens)
        free_gradients(optimizer, self.trainer.strategy.model)  # so that none occupies memory during generation
        return {**found, "grad_norm": norms["grad_norm"], "stepped": stepped, "skipped": bool(size) and not stepped}

    def _step(
        self, optimizer: LightningOptimizer, minibatch: Minibatch, found: LossOutputs, norms: dict[str, float]
    ) -> bool:
        """Steps optimizer and scheduler if all numbers are finite. Returns whether it did."""
        losses = {"mean_loss": found["mean_loss"]}
        if "value_loss" in found:
            losses["value_loss"] = found["value_loss"]
        if not self.finite_steps.allows(self.trainer, minibatch, losses | norms):
            return False
        optimizer.step()
        scheduler = cast(LRScheduler | None, self.lr_schedulers())
        if scheduler is not None:
            scheduler.step()
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad)
        self.finite_steps.check_weights(self.trainer, minibatch, trained, self.sharded)
        return True

    def _clip_gradients(self, iteration: int) -> dict[str, float]:
        """Clips the gradients of the policy and of a critic separately. Returns their norms before clipping."""
        critics = {}
        if self.critic is not None:
            self.critic.shape_gradients(self.value_model, self.value_target, iteration)
            critics = {"critic_grad_norm": clip_gradients(self.value_model, self.critic.max_grad_norm)}
        return {"grad_norm": clip_gradients(self.model, self.max_grad_norm)} | critics

    def configure_callbacks(self) -> list[L.Callback]:
        """Adds callbacks that a training run needs and the trainer lacks: metrics, proximal policy, critic values."""
        fed = getattr(self.trainer, "datamodule", None) is not None  # else minibatches come from some other loader
        if self.trainer.state.fn == "fit" and fed:
            supply(callbacks_of(self.trainer))
        return []  # Lightning would put returned callbacks behind those that read their metrics

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns the optimizer and, if configured, the scheduler."""
        groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        if self.critic is not None:  # shares the optimizer, so that a training step stays one optimizer step
            trained = [p for p in self.value_model.parameters() if p.requires_grad]
            groups.append({"params": trained, "lr": self.critic.lr})
        with made("model.optimizer"):
            optimizer = self.make_optimizer(groups)
        fuse(optimizer)
        self._optimizer_settings = group_settings(optimizer)
        make = self.make_lr_scheduler
        return optimizer if make is None else {"optimizer": optimizer, "lr_scheduler": make(optimizer)}

    def on_train_start(self) -> None:
        """Applies the present settings to a resumed run's optimizer."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        obey(optimizer.optimizer, self._optimizer_settings, scheduled=self.make_lr_scheduler is not None)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the shapes, which tell another model's checkpoint, the steps skipped in a row, and the rules' state."""
        skipped, rules = self.finite_steps.in_a_row, self.rules.state_dict()
        checkpoint |= self.described | {"skipped_in_a_row": skipped, "rules": rules}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model."""
        self.restored, fitting = True, self.trainer.state.fn == "fit"
        self.finite_steps.in_a_row = checkpoint.get("skipped_in_a_row", 0)
        policy_checkpoint.check(self.described, checkpoint, self.path or str(self.folder), fitting, self.freeze_vision)
        if fitting:
            check_state(self.make_optimizer, checkpoint)
            clear_unstepped(self.trainer, checkpoint)
            self.rules.load_state_dict(checkpoint.get("rules", {}))

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # settings, not hyperparameters
        cls, checkpoint_path: str | Path, map_location: Any = None, *_: Any, **settings: Any
    ) -> PolicyModule:
        """Loads a policy with a checkpoint's weights and its run's settings, see :func:`loaded_policy`.

        Args:
            checkpoint_path: A file, a folder of shards, or a run's folder, of which the newest checkpoint is loaded.
            map_location: Device that the policy is moved to.
            settings: Arguments of this class, which override the run's.
        """
        from popo_lightning.cli.export.policy_loading import loaded_policy

        settings = {name: value for name, value in settings.items() if name not in ("strict", "weights_only")}
        module = loaded_policy(cls, checkpoint_path, settings)
        return module if map_location is None else module.to(map_location)
