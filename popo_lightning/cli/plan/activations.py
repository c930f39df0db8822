"""Measures what a forward pass keeps for its backward pass, without memory or arithmetic."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from popo_lightning.cli.plan.architecture import adapted_layers, empty_model
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.model.loading import layers
from popo_lightning.model.lora import Lora

LENGTHS = (32, 96)  # tokens of two passes; their difference excludes what both keep, such as autocast's copies


@dataclass(frozen=True)
class Activations:
    """Bytes per token of a forward pass of the language model, without its output head.

    Args:
        layers: Bytes kept inside all layers.
        largest: Bytes kept inside the layer that keeps most.
        inputs: Bytes of all layers' inputs, which gradient checkpointing keeps.
        outside: Bytes kept outside the layers.
        state: Bytes of one state, which the head reads.
    """

    layers: float
    largest: float
    inputs: float
    outside: float
    state: float


def activations(
    config: Any, name: str, dtype: torch.dtype, autocast: bool, lora: Lora | None = None, freeze_vision: bool = False
) -> Activations:
    """Runs a model on tensors that only have shapes, and adds up what autograd keeps.

    Attention is the CPU's fused kernel, which keeps no scores, like flash attention.

    Args:
        config: transformers configuration.
        name: Name of the model, for messages.
        dtype: dtype of the weights in a pass; the computing dtype if they are sharded.
        autocast: Whether bfloat16 autocast is on.
        lora: Adapters; None without them. A frozen matrix keeps no inputs for its own gradient.
        freeze_vision: Whether a vision tower gets no adapters.

    Raises:
        SettingError: The model does not run.
    """
    from transformers.integrations import moe

    # torch logs a traceback of an operator that refuses such tensors; the error below says what happened
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    # experts by transformers' operator, which keeps what torch's keeps: torch's only has shapes for bfloat16
    experts = patch.object(moe, "_can_use_grouped_mm", lambda *of_call: False, create=True)
    with FakeTensorMode(allow_non_fake_inputs=True), experts:
        model = empty_model(config, name, torch.device("cpu"), dtype)
        if lora is not None:
            _add_stand_ins(model, lora, name, freeze_vision)
        try:
            short, long = (_KeptBytes(model).of_pass(length, autocast) for length in LENGTHS)
        except Exception as error:  # a model may need inputs besides tokens
            raise SettingError(
                f"model.path is '{name}', a {config.model_type}, which the plan cannot pass tokens through: "
                f"{reason(error)}"
            ) from error
    tokens = LENGTHS[1] - LENGTHS[0]
    return Activations(*((b - a) / tokens for a, b in zip(short, long, strict=True)))


class _StandIn(nn.Module):
    """Computes what peft's layer does: W x + s B (A x). peft cannot make a layer of tensors that only have shapes."""

    def __init__(self, base: nn.Linear, lora: Lora) -> None:
        super().__init__()
        self.base, self.scale = base, lora.scale
        self.entry = nn.Linear(base.in_features, lora.r, bias=False)
        self.output = nn.Linear(lora.r, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found = self.base(x)
        of_adapter: Tensor = self.output(self.entry(x)) * self.scale
        return (found + of_adapter).to(found.dtype)


def _add_stand_ins(model: Any, lora: Lora, name: str, freeze_vision: bool) -> None:
    model.requires_grad_(False)
    for target in adapted_layers(model, lora, name, freeze_vision):
        place, _, own = target.rpartition(".")
        setattr(model.get_submodule(place), own, _StandIn(model.get_submodule(target), lora))


class _KeptBytes:
    """Counts what autograd keeps of one pass, each storage once, by the layer that keeps it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.kept: list[int] = [0]  # bytes outside the layers, and inside each
        self.inputs = 0
        self.inside = 0  # index of the running layer; 0 for none
        self.storages: dict[int, Any] = {}  # kept alive, or another could get the address of a freed one

    def of_pass(self, length: int, autocast: bool) -> tuple[int, ...]:
        """Bytes kept of one sequence, in the order of :class:`Activations`."""
        decoder = getattr(self.model.base_model, "language_model", self.model.base_model)
        hooks = []
        for layer in layers(self.model):
            hooks.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._leave))
        with (
            torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            embedded = self.model.get_input_embeddings()(torch.zeros(1, length, dtype=torch.long))
            states = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        outside, *inside = self.kept
        return sum(inside), max(inside, default=0), self.inputs, outside, states.nbytes

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights and storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage
            self.kept[self.inside] += storage.nbytes()
        return tensor

    def _enter(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs += (args[0] if args else kwargs["hidden_states"]).nbytes
        self.kept.append(0)
        self.inside = len(self.kept) - 1

    def _leave(self, *of_layer: Any) -> None:
        self.inside = 0
