"""Loads a model that is sharded over the ranks: rank 0 reads it, and sends every rank its shard of each parameter.

Only one process holds the whole weights in host memory, for any number of ranks, and only one parameter at a time is
whole on a device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.ranks import broadcast_object
from popo_lightning.model.attention import PACKED, packed_attention, register_attention
from popo_lightning.model.loading import remove_dropout
from popo_lightning.model.logit_form import PLAIN, LogitForm
from popo_lightning.model.lora import Adapted, inject
from popo_lightning.model.sharding import shard_policy, shard_value_model

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Outline:
    """Description from which every rank builds the same model without weights, on the meta device."""

    kind: Any  # transformers class
    config: Any
    generation_config: Any
    parameters: dict[str, tuple[torch.dtype, bool]]  # type, and whether it is trained
    buffers: dict[str, Tensor]
    conversions: Any = None  # weight conversions between checkpoint and parameters, for saving
    logit_form: LogitForm = PLAIN
    adapted: Adapted | None = None

    @classmethod
    def of(cls, model: Any) -> Outline:
        """Describes a model made by load_trainable."""
        return cls(
            type(model),
            model.config,
            getattr(model, "generation_config", None),
            {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()},
            dict(model.named_buffers(remove_duplicate=False)),
            getattr(model, "_weight_conversions", None),
            getattr(model, "logit_form", PLAIN),
            getattr(model, "adapted", None),
        )

    def build(self) -> Any:
        """Builds the model with its buffers on the CPU and its parameters on the meta device."""
        # The configuration may name it, and only rank 0 has loaded a model.
        register_attention(PACKED, packed_attention)
        with torch.device("meta"):
            model = self.kind._from_config(self.config)
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        model._weight_conversions = self.conversions
        model.logit_form = self.logit_form
        if self.adapted is not None:
            inject(model, self.adapted)
        parameters = dict(model.named_parameters())
        if parameters.keys() != self.parameters.keys():
            raise RuntimeError(
                "the model built from its configuration has other parameters than the one that rank 0 loaded: "
                f"{sorted(parameters.keys() ^ self.parameters.keys())}"
            )
        for name, (dtype, trained) in self.parameters.items():
            parameters[name].data = parameters[name].data.to(dtype)
            parameters[name].requires_grad_(trained)
        for name, buffer in self.buffers.items():
            place, _, own = name.rpartition(".")
            model.get_submodule(place)._buffers[own] = buffer.clone()
        remove_dropout(model)
        return model.eval()


def loaded_on_first_rank(load: Callable[[], Any]) -> tuple[Any, Outline]:
    """Loads a model on rank 0. Returns it there, None on the other ranks, and its outline. A collective.

    Args:
        load: Loads the model; called only on rank 0.

    Raises:
        SettingError: On all ranks if `load` raised it, and on all but rank 0 if it raised anything else.
    """
    whole: Any = None
    told: Outline | str | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            whole = load()
            told = Outline.of(whole)
        except Exception as error:  # any error, because the other ranks must not wait for a model
            failure = error
            told = str(error) if isinstance(error, SettingError) else f"no model loads on rank 0: {reason(error)}"
    told = broadcast_object(told)
    if failure is not None:
        raise failure
    if isinstance(told, str):
        raise SettingError(told)
    assert told is not None
    return whole, told


def split_models(policy: Any, whole: Any, mesh: DeviceMesh) -> None:
    """Shards a policy, its reference and its critic, built on the meta device, and gives them their weights.

    Args:
        policy: The PolicyModule.
        whole: Model that rank 0 has loaded; None on the other ranks.
        mesh: Device mesh of the ranks.
    """
    device = policy.trainer.strategy.root_device
    for model in (policy.model, *policy._reference):
        shard_policy(model, mesh, policy.compute_dtype)
        fill(model, None if whole is None else named(whole), device)
    if policy.critic is None:
        return
    copied = policy.value_target
    copies = [] if copied is None else [part for part in (copied.model, copied.speed) if part is not None]
    for part in (policy.value_model, *copies):
        shard_value_model(part, mesh, policy.compute_dtype)
        fill(part, None if whole is None else policy.critic.first_weights(whole), device)
    if copied is not None:
        copied.rest()


def named(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def fill(model: nn.Module, weights: Weights | None, device: torch.device) -> None:
    """Gives a sharded model on the meta device its weights, one parameter at a time. A collective.

    Tied parameters stay one object. Separate objects would have the same values, but only part of the gradient each.

    Args:
        model: Model after fully_shard, whose buffers have their values.
        weights: Whole weights by name on rank 0; None on the other ranks.
        device: Device of this rank.
    """
    places: defaultdict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places[parameter].append((module, name))
    for name, parameter in list(model.named_parameters()):
        split = _scattered(parameter, None if weights is None else weights[name], device)
        own = nn.Parameter(split, requires_grad=parameter.requires_grad)
        for module, its_name in places[parameter]:
            setattr(module, its_name, own)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    without = [name for name, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    for module in model.modules():  # tensors that a model keeps beside its parameters and buffers
        held = [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
        without += [f"{type(module).__name__}.{name}" for name in held]
    if without:
        raise RuntimeError(f"no weights were loaded for {', '.join(without)}")


def _scattered(parameter: Any, whole: Tensor | None, device: torch.device) -> Tensor:
    """Returns this rank's shard of a whole tensor on rank 0."""
    assert isinstance(parameter, DTensor), "fully_shard leaves no parameter whole"
    if whole is None:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)  # only shape and dtype matter
    assert (whole.shape, whole.dtype) == (parameter.shape, parameter.dtype)
    return distribute_tensor(whole.to(device).contiguous(), parameter.device_mesh, parameter.placements)
