"""The policy: a language model and the objective it is trained on. Knows nothing of engines, tasks or buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch, Row, token_columns
from popo_lightning.core.ranks import gathered, over_ranks, whole
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model import policy_checkpoint
from popo_lightning.model.attention import check_attention
from popo_lightning.model.critic import Critic, check_critic
from popo_lightning.model.flat_sharding import flatly_sharded
from popo_lightning.model.loading import (
    check_adapter,
    compile_layers,
    image_tokens,
    load_trainable,
    sees_images,
    settle_modes,
)
from popo_lightning.model.packing import LayerCosts, micro_batches, shares_prompts
from popo_lightning.model.padded_rows import PaddedRows, pad_sequences
from popo_lightning.model.saved_weights import as_saved, saved_buffers
from popo_lightning.model.scoring import response_logprobs, scores_by_row
from popo_lightning.model.sharded_loading import FirstRanksModel, split_models
from popo_lightning.model.sharding import whole_weights
from popo_lightning.objectives.advantages import Advantage, GroupNormalised, check_weight
from popo_lightning.objectives.generalised_advantage import moments, whiten
from popo_lightning.objectives.inputs import MinibatchTokens
from popo_lightning.objectives.objective import Objective
from popo_lightning.training.finite_steps import FiniteSteps
from popo_lightning.training.gradient_sync import add_up_gradients, check_gradient_sync, free_gradients
from popo_lightning.training.minibatch_loss import MinibatchLoss
from popo_lightning.training.optimizers import check_state, fuse, group_settings, made, obey

PRECISIONS = ("32-true", "bf16-mixed")


class PolicyModule(L.LightningModule):
    """A causal language model trained on groups of graded responses.

    Optimization is manual with exactly one optimizer step a training step: a minibatch is split into micro-batches
    by a token budget, their number varies, and under automatic optimization each would be a training step of its
    own. So checkpoints and schedulers keep their Lightning meaning, and clipping is ours.

    Args:
        path: Model folder or hub id, as transformers and vLLM load it. Leave it out to use warm_start.
        warm_start: Builds a tiny policy on first use, for the embedded tasks.
        objective: Behaviour weight, trust region and regularizers.
        advantage: How a group's rewards become advantages.
        critic: A value model beside the policy, for advantages that need one.
        optimizer: Optimizer over the policy's parameters.
        lr_scheduler: Learning-rate scheduler, stepped once an optimizer step.
        max_grad_norm: Gradients are scaled down to this norm; null leaves them.
        max_skipped_steps: A step whose loss or gradient norm is not finite is skipped on all ranks; so many in a row
            end the run.
        micro_batch_tokens: Padded tokens of one forward pass. Bounds memory; the loss does not depend on it.
        shared_prompts: Compute a prompt once for several responses to it, where that costs less: the log-probs are the
            same up to rounding. Models whose layers do not all attend to all earlier tokens, those that see images and
            flash attention compute it for each response either way.
        attention: sdpa, eager, flex_attention, flash_attention_2, flash_attention_3 or a kernel of the hub; null for
            the fastest that is exact: without any padding where prompts can be shared, else sdpa.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        gradient_sync: When split models (FSDP2) add their gradients up over the ranks. step: once, after the last
            micro-batch; until then each rank holds all gradients whole, in float32. micro_batch: after each, so that a
            rank holds its part alone; every micro-batch then sends all gradients. DDP does the first, which costs it
            no memory, and FSDP1 the second.
        compile_layers: Compile the policy's layers by torch.compile: a minute or more at the start, faster passes.
        freeze_vision: Train the language model only, and leave the vision tower as it is.
        dtype: Type of the trained weights. Compute in bfloat16 by trainer.precision bf16-mixed, which keeps float32
            weights; bfloat16 weights take half the memory, and round updates away that are small against the weight.
        temperature: Set from data.temperature.
        reward: Reward part that is trained on.
    """

    model: Any  # of transformers, once configure_model has run

    def __init__(
        self,
        path: str | None = None,
        warm_start: WarmStart | None = None,
        objective: Objective = Objective(),  # noqa: B008  # holds settings only
        advantage: Advantage = GroupNormalised(),  # noqa: B008
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
        reward: str = "score",
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
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise SettingError(f"model.max_grad_norm is {max_grad_norm}; use a positive norm, or null for no clipping")
        if micro_batch_tokens < 1:
            raise SettingError(f"model.micro_batch_tokens is {micro_batch_tokens}; use at least 1")
        if dtype not in ("float32", "bfloat16"):
            raise SettingError(f"model.dtype is '{dtype}'; use float32 or bfloat16")
        check_gradient_sync(gradient_sync)
        check_critic(critic, advantage)
        check_weight(advantage, objective.behave_weight)
        self.automatic_optimization = False
        self.path = path
        self.warm_start = warm_start
        self.objective = objective
        self.advantage = advantage
        self.critic = critic
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.finite_steps = FiniteSteps(max_skipped_steps)
        self.micro_batch_tokens = micro_batch_tokens
        self.shared_prompts = shared_prompts
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.gradient_sync = gradient_sync
        self.compile_layers = compile_layers
        self.freeze_vision = freeze_vision
        self.weight_dtype: torch.dtype = getattr(torch, dtype)
        self.temperature = temperature
        self.reward = reward
        self.forbidden_token_ids: list[int] = []
        self.restored = False  # whether a checkpoint has brought other weights than the folder's
        self.iteration_metrics: dict[str, float] = {}  # written by the Monitor callback, read by whoever shows them
        self._reference: list[nn.Module] = []  # in a list: neither trained nor saved with the policy

    # -- the model ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> str | Path:
        """Where model and tokenizer are loaded from, by the policy and by the engine alike."""
        if self.warm_start is not None:
            return self.warm_start.folder()
        assert self.path is not None
        if not Path(self.path).exists() and (self.path.startswith((".", "/", "~")) or self.path.count("/") != 1):
            raise SettingError(f"model.path is '{self.path}', which is no folder here; give a model folder or a hub id")
        check_adapter(self.path)
        return self.path

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type that matrices are multiplied in, by the policy and by the engine."""
        precision = str(self.trainer.precision)
        return torch.bfloat16 if precision.startswith("bf16") else self.weight_dtype

    def configure_model(self) -> None:
        """Loads the model once the strategy knows its devices; called again by each trainer entry point."""
        if hasattr(self, "model"):
            return
        if (precision := str(self.trainer.precision)) not in PRECISIONS:
            raise SettingError(
                f"trainer.precision is '{precision}'; use {' or '.join(PRECISIONS)} (and model.dtype bfloat16 for "
                "bfloat16 weights), since the engine and the clipping of gradients follow no other"
            )
        check_attention(self.attention, self.trainer.strategy.root_device, self.compute_dtype)
        load = partial(load_trainable, self.folder, self.weight_dtype, self.freeze_vision, self.attention)
        if self.device_mesh is None:
            self._take(load())
            if isinstance(strategy := self.trainer.strategy, FSDPStrategy):
                self.model = flatly_sharded(self.model, strategy, self.compute_dtype)
                self._reference = [flatly_sharded(model, strategy, self.compute_dtype) for model in self._reference]
        else:
            first = FirstRanksModel(load)
            self._take(first.outline.build())  # all but the weights, which are on the meta device
            split_models(self, first, self.device_mesh["data_parallel"])

    def _take(self, model: Any) -> None:
        """Makes a loaded model the policy, and the critic's and the reference's beginning."""
        if sees_images(model.config):
            self.forbidden_token_ids = image_tokens(model.config)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if self.compile_layers:
            compile_layers(model)
        settle_modes(model, self.gradient_checkpointing)
        self.model = model
        if self.critic is not None:
            self.value_model = self.critic.build(self.model)
        if self.objective.needs_reference:
            self._reference = [copy.deepcopy(self.model).requires_grad_(False)]
        self.described = policy_checkpoint.describe(self)

    @property
    def sharded(self) -> bool:
        """Whether weights are split over the ranks, so that every pass is a collective."""
        return isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by parameter name, in the engine's type; sharded ones are gathered one at a time.

        Buffers that a checkpoint has come last, as they are: an engine may keep the bias of a router among its weights.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, weight in whole_weights(self.model):
            if name not in tied:
                yield name, weight.to(self.compute_dtype)
        yield from saved_buffers(self.model)

    def as_saved(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Weights of :meth:`named_weights` as a checkpoint of this model has them."""
        flat = isinstance(self.model, FullyShardedDataParallel)
        return as_saved(self.model.module if flat else self.model, weights)

    # -- log-probs ---------------------------------------------------------------------------------------------

    def forward(self, rows: PaddedRows, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the response tokens.

        Args:
            rows: R padded rows on this module's device.
            model: The policy unless another model, such as the reference, is given.

        Returns:
            ((R, T), (R, T)) float32, zero at padding.
        """
        scored: Any = self.model if model is None else model
        score = getattr(scored, "response_logprobs", None) or partial(response_logprobs, scored)  # sharded, or whole
        found: tuple[Tensor, Tensor] = score(
            rows, self.temperature, self.forbidden_token_ids, self.objective.needs_entropy
        )
        return found

    def logprobs(self, minibatch: Minibatch) -> list[Tensor]:
        """(T,) log-probs of every response under the present weights, on the CPU, in row order.

        In the precision of a training step: of other numerics the ratio would speak, not of a moved policy.
        """
        return self._row_by_row(minibatch, lambda part: self(part)[0])

    def values(self, minibatch: Minibatch) -> list[Tensor]:
        """(T,) values of the critic, as :meth:`logprobs` gives log-probs."""
        return self._row_by_row(minibatch, self.value_model)

    def _row_by_row(self, minibatch: Minibatch, score: Callable[[PaddedRows], Tensor]) -> list[Tensor]:
        passes = self._passes(minibatch, minibatch.rows())
        # sharded, every pass gathers weights from all ranks
        most = int(over_ranks(self.trainer, len(passes), "max")) if self.sharded else 0
        with self.trainer.precision_plugin.forward_context():
            return scores_by_row(passes, score, self.device, most)

    def _passes(self, minibatch: Minibatch, rows: Sequence[Row]) -> list[PaddedRows]:
        """A minibatch's rows in micro-batches. The same rows are always split alike, whatever is known of them.

        Groups whose rewards are equal come apart, because most often their rows have no gradient.
        """
        effective = [group.is_effective(self.reward) for group in minibatch.groups for _ in group.responses]
        kinds = [[row for row in rows if effective[row.index] is kind] for kind in (True, False)]
        split = [part for kind in kinds for part in micro_batches(kind, self.micro_batch_tokens, self._layer_costs)]
        return [pad_sequences(sequences) for sequences in split]

    @cached_property
    def _layer_costs(self) -> LayerCosts | None:
        """By which prompts are shared; None where they are not."""
        base = self.model.base_model
        shares = self.shared_prompts and shares_prompts(base)
        return LayerCosts.of_model(base.config, self.device.type) if shares else None

    # -- training ----------------------------------------------------------------------------------------------

    def advantages(self, minibatch: Minibatch, values: list[Tensor] | None = None) -> list[Tensor]:
        """One tensor per row: () for the whole response, or (T,); before any whitening.

        Args:
            minibatch: Whose rows.
            values: (T,) per row, a critic's; null takes those recorded, or without any asks for them here.
        """
        values = minibatch.values if values is None else values
        if values is None and self.advantage.needs_values:
            values = self.values(minibatch)
        found: list[Tensor] = []
        for group in minibatch.groups:
            if group.advantages is not None:
                found += group.advantages.unbind()
                continue
            here = slice(len(found), len(found) + len(group.responses))
            # none for fresh groups: prox sampled them, and what engine and trainer differ by is no distance
            old = group.version < minibatch.version and minibatch.prox_logp is not None
            prox = minibatch.prox_logp[here] if old and minibatch.prox_logp is not None else None
            found += self.advantage.for_group(group, self.reward, prox, None if values is None else values[here])
        return found

    def _rows(self, minibatch: Minibatch) -> list[Row]:
        """A minibatch's rows with their advantages, and what a critic learns from."""
        values = minibatch.values
        if self.critic is not None and values is None:
            values = self.values(minibatch)
        advantages = self.advantages(minibatch, values)
        returns = None
        if values is not None:
            returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
        if self.advantage.whitens:
            of_all = torch.tensor([over_ranks(self.trainer, float(m), "sum") for m in moments(advantages)])
            advantages = whiten(advantages, of_all)
        return minibatch.rows(advantages, values, returns)

    def training_step(self, minibatch: Minibatch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step on one minibatch.

        Returns:
            "tokens": TokenSums of its response tokens on this rank, still on the device; "mean_loss", "grad_norm",
            "stepped" (False where no rank had a token to learn from, or the step was skipped), "skipped" (True where it
            was not finite), "region" (what the trust region reports); with a critic also "value_loss".

        Raises:
            NotFiniteError: Too many steps in a row were not finite, or the weights are not any more.
        """
        optimizer: Any = self.optimizers()
        rows = self._rows(minibatch)
        objective = self._objective_for(minibatch, rows)
        # One denominator for the whole minibatch over all ranks; DDP averages gradients, hence the world size.
        world_size = self.trainer.world_size
        size = over_ranks(self.trainer, objective.aggregation.size(_lengths(rows)), "sum")
        tokens = over_ranks(self.trainer, minibatch.tokens, "sum")
        losses = MinibatchLoss(self, objective, minibatch, size / world_size, tokens / world_size)
        add_up_gradients(self, losses, self._passes(minibatch, rows))
        norms = self._clip_gradients() if size else {"grad_norm": float("nan")}
        found = losses.outputs()
        stepped = bool(size) and self._step(optimizer, minibatch, found, norms)
        free_gradients(optimizer, self.trainer.strategy.model)  # none lives through a generation
        step = {"grad_norm": norms["grad_norm"], "stepped": stepped, "skipped": bool(size) and not stepped}
        return found | step

    def _step(self, optimizer: Any, minibatch: Minibatch, found: dict[str, Any], norms: dict[str, float]) -> bool:
        """Takes the optimizer's step, and the scheduler's, if all numbers are finite; whether it did."""
        losses = {name: found[name] for name in ("mean_loss", "value_loss") if name in found}
        if not self.finite_steps.allows(self.trainer, minibatch, losses | norms):
            return False
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad)
        self.finite_steps.check_weights(self.trainer, minibatch, trained, self.sharded)
        return True

    def _objective_for(self, minibatch: Minibatch, rows: Sequence[Row]) -> Objective:
        """The objective, with whatever it derives from all tokens of a minibatch: one more forward pass."""
        if not self.objective.needs_minibatch_tokens:
            return self.objective
        flat = gathered(token_columns(rows, self.logprobs(minibatch)))
        return self.objective.for_minibatch(MinibatchTokens(flat[0], flat[1], flat[2], flat[3], flat[4].bool()))

    @torch.no_grad()
    def reference_logprobs(self, part: PaddedRows) -> Tensor | None:
        """(R, T) under the frozen reference, where a regularizer asks for it."""
        if not self._reference:
            return None
        logp, _ = self(part, self._reference[0].to(self.device))
        return cast(Tensor, logp)

    def _clip_gradients(self) -> dict[str, float]:
        """Norms of the gradients before clipping: the policy's, and a critic's, which is clipped by itself."""
        critics = {}
        if self.critic is not None:
            critics = {"critic_grad_norm": self.critic.clip_gradients(self.value_model)}
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        if isinstance(self.model, FullyShardedDataParallel):  # each rank has pieces of which it alone knows the norm
            norm = float(self.model.clip_grad_norm_(limit).detach())
        else:
            norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)))
        return {"grad_norm": norm} | critics

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and, if asked for, scheduler."""
        groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        if self.critic is not None:  # a group of the one optimizer, so that a training step stays one optimizer step
            trained = [p for p in self.value_model.parameters() if p.requires_grad]
            groups.append({"params": trained, "lr": self.critic.lr})
        with made("model.optimizer"):
            optimizer = self.make_optimizer(groups)
        fuse(optimizer)
        self._optimizer_settings = group_settings(optimizer)
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_lr_scheduler(optimizer)}

    def on_train_start(self) -> None:
        """A resumed run's optimizer obeys the present settings."""
        optimizer: Any = self.optimizers()
        obey(optimizer.optimizer, self._optimizer_settings, scheduled=self.make_lr_scheduler is not None)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the shapes, so that a checkpoint of another model is recognised, and the steps skipped in a row."""
        checkpoint |= self.described | {"skipped_in_a_row": self.finite_steps.in_a_row}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model."""
        self.restored = True
        fitting = self.trainer.state.fn == "fit"
        self.finite_steps.in_a_row = checkpoint.get("skipped_in_a_row", 0)
        policy_checkpoint.check(self.described, checkpoint, self.path or str(self.folder), fitting, self.freeze_vision)
        if fitting:
            check_state(self.make_optimizer, checkpoint)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing to do: the Evaluation callback reads the graded responses in the batch."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As :meth:`validation_step`."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The benchmark's name; the Evaluation callback writes the responses."""
        return batch[0]


def _lengths(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([len(row.response.token_ids) for row in rows], dtype=torch.long)
