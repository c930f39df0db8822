"""The policy's language model: loading, sharding over ranks, log-probs, and the weights for an engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch, Row
from popo_lightning.core.ranks import all_reduce
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model import policy_checkpoint
from popo_lightning.model.attention import check_attention
from popo_lightning.model.critic import Critic
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
from popo_lightning.objectives.objective import Objective

PRECISIONS = ("32-true", "bf16-mixed")


class PolicyModel(L.LightningModule):
    """A language model as a LightningModule; :class:`PolicyModule` has its settings, and trains it.

    Attributes:
        model: The transformers model, once configure_model has run.
        forbidden_token_ids: Tokens that no engine may sample: those that stand for images.
        restored: Whether a checkpoint has loaded weights other than the folder's.
    """

    model: Any
    path: str | None
    warm_start: WarmStart | None
    objective: Objective
    critic: Critic | None
    weight_dtype: torch.dtype
    attention: str | None
    freeze_vision: bool
    gradient_checkpointing: bool
    compile_layers: bool
    micro_batch_tokens: int
    shared_prompts: bool
    temperature: float
    reward_key: str

    def __init__(self) -> None:
        super().__init__()
        self.forbidden_token_ids: list[int] = []
        self.restored = False
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
        else:
            first = FirstRanksModel(load)
            self._take(first.outline.build())  # all but the weights, which are on the meta device
            split_models(self, first, self.device_mesh["data_parallel"])

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
            self.value_model = self.critic.build(self.model)
        if self.objective.needs_reference:
            self._reference = [copy.deepcopy(self.model).requires_grad_(False)]
        revision = policy_checkpoint.revision(self.path)
        self.described = policy_checkpoint.describe(self) | {policy_checkpoint.REVISION: revision}

    @property
    def sharded(self) -> bool:
        """Whether weights are split over the ranks, so that every pass is a collective."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

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
        return as_saved(self.model, weights)

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

        Uses the training step's precision; otherwise the ratio would measure numerical error instead of policy change.
        """
        return self._row_by_row(minibatch, lambda part: self(part)[0])

    def values(self, minibatch: Minibatch) -> list[Tensor]:
        """(T,) values of the critic, as :meth:`logprobs` gives log-probs."""
        return self._row_by_row(minibatch, self.value_model)

    def _row_by_row(self, minibatch: Minibatch, score: Callable[[PaddedRows], Tensor]) -> list[Tensor]:
        passes = self._passes(minibatch, minibatch.rows())
        # sharded, every pass gathers weights from all ranks
        most = int(all_reduce(self.trainer, len(passes), "max")) if self.sharded else 0
        with self.trainer.precision_plugin.forward_context():
            return scores_by_row(passes, score, self.device, most)

    def _passes(self, minibatch: Minibatch, rows: Sequence[Row]) -> list[PaddedRows]:
        """A minibatch's rows in micro-batches. The same rows are always split in the same way.

        Groups whose rewards are equal come apart, because most often their rows have no gradient.
        """
        effective = [group.is_effective(self.reward_key) for group in minibatch.groups for _ in group.responses]
        kinds = [[row for row in rows if effective[row.index] is kind] for kind in (True, False)]
        split = [part for kind in kinds for part in micro_batches(kind, self.micro_batch_tokens, self._layer_costs)]
        return [pad_sequences(sequences) for sequences in split]

    @cached_property
    def _layer_costs(self) -> LayerCosts | None:
        """By which prompts are shared; None where they are not."""
        base = self.model.base_model
        shares = self.shared_prompts and shares_prompts(base)
        return LayerCosts.of_model(base.config, self.device.type) if shares else None

    @torch.no_grad()
    def reference_logprobs(self, part: PaddedRows) -> Tensor | None:
        """(R, T) under the frozen reference, where a regularizer asks for it."""
        if not self._reference:
            return None
        logp, _ = self(part, self._reference[0].to(self.device))
        return cast(Tensor, logp)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing to do: the Evaluation callback reads the graded responses in the batch."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As :meth:`validation_step`."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The benchmark's name; the Evaluation callback writes the responses."""
        return batch[0]
