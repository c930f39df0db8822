"""The policy's language model: loading, sharding over ranks, log-probs, and the weights for an engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch, Row
from popo_lightning.core.ranks import all_gather_object, all_reduce, full_tensor
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model import policy_checkpoint
from popo_lightning.model.attention import check_attention
from popo_lightning.model.critic import Critic, ValueModel
from popo_lightning.model.critic_target import TargetCopy, kept_of_critic
from popo_lightning.model.files import check_adapter
from popo_lightning.model.fingerprint import fingerprint
from popo_lightning.model.loading import compile_layers, image_tokens, load_trainable, sees_images, settle_modes
from popo_lightning.model.lora import (
    Lora,
    adapters,
    check_split,
    keep_adapters_only,
    take_inputs_as_they_are,
    without_adapters,
)
from popo_lightning.model.nested_head import problem_groups
from popo_lightning.model.packing import LayerCosts, micro_batches, shares_prompts
from popo_lightning.model.padded_rows import PaddedRows, PassOutputs, pad_sequences
from popo_lightning.model.saved_weights import as_saved, merged_weights, saved_buffers
from popo_lightning.model.scoring import response_logprobs, scores_by_row
from popo_lightning.model.sharded_loading import loaded_on_first_rank, split_models
from popo_lightning.model.sharding import check_precision
from popo_lightning.objectives.advantages import Advantage
from popo_lightning.objectives.objective import Objective


class PolicyModel(L.LightningModule):
    """A language model as a LightningModule. :class:`PolicyModule` adds training, and sets the attributes below.

    Attributes:
        model: The transformers model, once configure_model has run.
        iteration_metrics: Metrics of the last iteration. The Monitor callback writes them, other callbacks read them.
        forbidden_token_ids: Tokens that no engine may sample, because they stand for images.
        restored: Whether a checkpoint has loaded weights other than the folder's.
    """

    model: Any
    path: str | None
    warm_start: WarmStart | None
    objective: Objective
    advantage: Advantage
    critic: Critic | None
    lora: Lora | None
    weight_dtype: torch.dtype
    attention: str | None
    freeze_vision: bool
    gradient_checkpointing: bool
    compile_layers: bool
    micro_batch_tokens: int
    shared_prompts: bool
    temperature: float
    reward_key: str
    iteration_metrics: dict[str, float]

    def __init__(self) -> None:
        super().__init__()
        self.forbidden_token_ids: list[int] = []
        self.restored = False
        self.keeps_reference = False  # set if something other than the objective needs the reference
        self.value_target: TargetCopy | None = None
        self._reference: list[nn.Module] = []  # in a list: neither trained nor saved with the policy

    # -- the model ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> str | Path:
        """Folder or hub id from which policy and engine load model and tokenizer."""
        if self.warm_start is not None:
            return self.warm_start.folder()
        assert self.path is not None
        if not Path(self.path).exists() and (self.path.startswith((".", "/", "~")) or self.path.count("/") != 1):
            raise SettingError(f"model.path is '{self.path}', which is no folder here; give a model folder or a hub id")
        check_adapter(self.path)
        return self.path

    @property
    def reference(self) -> nn.Module:
        """The frozen first policy, as a model of its own. There is none with LoRA, or if nothing compares with it."""
        return self._reference[0]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of matrix multiplications in the policy and in the engine."""
        precision = str(self.trainer.precision)
        return torch.bfloat16 if precision.startswith("bf16") else self.weight_dtype

    def configure_model(self) -> None:
        """Loads the model once the strategy knows its devices; called again by each trainer entry point."""
        if hasattr(self, "model"):
            return
        precision = check_precision(self.trainer.precision)
        check_attention(self.attention, self.trainer.strategy.root_device, self.compute_dtype)
        check_split(self.lora, self.device_mesh is not None)
        load = partial(load_trainable, self.folder, self.weight_dtype, self.freeze_vision, self.attention, self.lora)
        if self.device_mesh is None:
            self._take(load())
        else:
            whole, outline = loaded_on_first_rank(load)
            self._take(outline.build())  # its weights are still on the meta device
            split_models(self, whole, self.device_mesh["data_parallel"])
        if self.lora is not None and precision == "bf16-mixed":
            take_inputs_as_they_are(self.model)

    def _take(self, model: Any) -> None:
        """Makes a loaded model the policy, and the initial critic and reference."""
        if sees_images(model.config):
            self.forbidden_token_ids = image_tokens(model.config)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if self.compile_layers:
            compile_layers(model)
        settle_modes(model, self.gradient_checkpointing)
        self.model = model
        if self.critic is not None:
            self.value_model = ValueModel(self.model, self.critic)
            self.value_target = self.critic.copied(self.value_model)
        if self.needs_reference and self.lora is None:  # with LoRA, the reference is the model without adapters
            self._reference = [copy.deepcopy(self.model).requires_grad_(False)]
        if self.lora is not None:
            keep_adapters_only(self, partial(kept_of_critic, self))
        self.described = policy_checkpoint.describe(self) | policy_checkpoint.origin(self.path)

    @property
    def as_loaded(self) -> bool:
        """Whether the policy has exactly its folder's weights: not a checkpoint's, and not rounded to 4 bits."""
        return not self.restored and not (self.lora is not None and self.lora.four_bit)

    @property
    def needs_reference(self) -> bool:
        """Whether the objective, a limit or the composer compares the policy with the first one."""
        return self.objective.needs_reference or self.keeps_reference

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded over the ranks, so that every pass is a collective."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def named_weights(self, given: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights by parameter name, in the engine's dtype; sharded ones are gathered one at a time.

        Adapters are merged into their weights, one at a time. A checkpoint's buffers come last, unchanged, because an
        engine may keep the bias of a router among its weights.

        Args:
            given: Values of the adapters by name, which replace their present ones.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, weight in merged_weights(self.model, self.compute_dtype, given):
            if name not in tied:
                yield name, weight
        yield from saved_buffers(self.model)

    def kept_weights(self) -> dict[str, Tensor]:
        """Copies to the CPU the data from which :meth:`weights_kept` later restores the present weights."""
        if self.lora is None:
            return {name: weight.detach().to("cpu", copy=True) for name, weight in self.named_weights()}
        return {name: full_tensor(each.detach()).to("cpu", copy=True) for name, each in adapters(self.model).items()}

    def weights_kept(self, kept: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """Returns :meth:`named_weights` as they were when they were kept.

        Args:
            kept: Result of :meth:`kept_weights`.
        """
        return kept.items() if self.lora is None else self.named_weights(kept)

    def trained_bits(self) -> str:
        """Returns a fingerprint of the trained weights of all ranks, which changes when a step moves the policy."""
        trained = ((name, each) for name, each in self.model.named_parameters() if each.requires_grad)
        own = fingerprint(((name, getattr(each, "_local_tensor", each)) for name, each in trained), whole=False)
        return " ".join(all_gather_object(own)) if self.sharded else own

    def as_saved(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Converts :meth:`named_weights` to the names and shapes of this model's checkpoint."""
        return as_saved(self.model, weights)

    # -- log-probs ---------------------------------------------------------------------------------------------

    def forward(self, rows: PaddedRows, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Computes log-probs and entropies of the response tokens.

        Args:
            rows: R padded rows on this module's device.
            model: Model to use, such as the reference; None for the policy.

        Returns:
            ((R, T), (R, T)) float32, zero at padding.
        """
        scored: Any = self.model if model is None else model
        score = getattr(scored, "response_logprobs", None) or partial(response_logprobs, scored)  # sharded, or whole
        return score(rows, self.temperature, self.forbidden_token_ids, self.objective.needs_entropy)

    def run(self, rows: PaddedRows) -> PassOutputs:
        """Runs one forward pass of every model that the loss needs: the policy, the reference and the critic.

        Args:
            rows: Padded rows on any device.
        """
        rows = rows.to(self.device)
        logp, entropy = self(rows)
        values = None if self.critic is None else self.value_model(rows)
        return PassOutputs(rows, logp, entropy, self.reference_logprobs(rows), values)

    def logprobs(self, minibatch: Minibatch) -> list[Tensor]:
        """Returns (T,) log-probs of every response under the present weights, on the CPU, in row order.

        Uses the training step's precision; otherwise the ratio would measure numerical error instead of policy change.
        """
        return self._row_by_row(minibatch, lambda part: self(part)[0])

    def estimates(self, minibatch: Minibatch) -> dict[str, list[Tensor]]:
        """Returns (T,) for every response, by name: the critic's values, and further estimates by its settings."""
        assert self.critic is not None
        groups = problem_groups(minibatch, self.critic.head)
        copied = None if self.value_target is None else self._row_by_row(minibatch, self.value_target.model, **groups)
        return self.critic.estimates_of(self._row_by_row(minibatch, self.value_model, **groups), copied)

    def advantages(self, minibatch: Minibatch) -> list[Tensor]:
        """Returns the advantage of every row; :class:`PolicyModule` has it."""
        raise NotImplementedError

    def reference_scores(self, minibatch: Minibatch) -> list[Tensor]:
        """Returns (T,) log-probs of every response under the frozen reference, on the CPU, in row order."""
        return self._row_by_row(minibatch, self._under_reference)

    def _row_by_row(self, minibatch: Minibatch, score: Callable[..., Tensor], **columns: list[Tensor]) -> list[Tensor]:
        passes = self._passes(minibatch, minibatch.rows(**columns))
        # With sharded weights, every pass gathers them from all ranks.
        min_passes = int(all_reduce(self.trainer, len(passes), "max")) if self.sharded else 0
        with self.trainer.precision_plugin.forward_context():
            return scores_by_row(passes, score, self.device, min_passes)

    def _passes(self, minibatch: Minibatch, rows: Sequence[Row]) -> list[PaddedRows]:
        """Splits a minibatch's rows into micro-batches, always in the same way.

        Groups with equal rewards get separate micro-batches, because their rows usually have no gradient.
        """
        effective = [group.is_effective(self.reward_key) for group in minibatch.groups for _ in group.responses]
        kinds = [[row for row in rows if effective[row.index] is kind] for kind in (True, False)]
        split = [part for kind in kinds for part in micro_batches(kind, self.micro_batch_tokens, self._layer_costs)]
        return [pad_sequences(sequences) for sequences in split]

    @cached_property
    def _layer_costs(self) -> LayerCosts | None:
        """Costs that decide which responses share a prompt; None if none do."""
        base = self.model.base_model
        shares = self.shared_prompts and shares_prompts(base)
        return LayerCosts.of_model(base.config, self.device.type) if shares else None

    @torch.no_grad()
    def reference_logprobs(self, rows: PaddedRows) -> Tensor | None:
        """Returns (R, T) log-probs under the frozen reference, or None if the objective does not need them."""
        return self._under_reference(rows) if self.objective.needs_reference else None

    def _under_reference(self, rows: PaddedRows) -> Tensor:
        if self.lora is None:
            return cast(Tensor, self(rows, self.reference.to(self.device))[0])
        with without_adapters(self.model):
            return cast(Tensor, self(rows)[0])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Does nothing, because the Evaluation callback reads the graded responses in the batch."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Does nothing, see :meth:`validation_step`."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Returns the benchmark's name. The Evaluation callback writes the responses."""
        return batch[0]


def policy_of(module: L.LightningModule) -> PolicyModel:
    """The policy, which Lightning gives to callbacks as any module."""
    return cast(PolicyModel, module)
