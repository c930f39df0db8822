"""FSDP1: a model split over the ranks as flat pieces of its layers, for Lightning's FSDPStrategy."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from popo_lightning.core.errors import SettingError
from popo_lightning.model.loading import layers
from popo_lightning.model.scoring import response_logprobs

WRAPPER = "_fsdp_wrapped_module."


def check_flat_sharding(strategy: FSDPStrategy, has_critic: bool) -> None:
    """Raises SettingError for what only FSDP2 does here."""
    instead = "use lightning.pytorch.strategies.ModelParallelStrategy (FSDP2), as configs/scale/fsdp2.yaml does"
    if has_critic:
        raise SettingError(f"model.critic is set, but trainer.strategy is FSDPStrategy (FSDP1); {instead}")
    if strategy._state_dict_type != "full":
        raise SettingError(
            f"trainer.strategy.state_dict_type is '{strategy._state_dict_type}', whose checkpoints no other strategy "
            f"reads; set it to full, or {instead}"
        )


def flatly_sharded(model: Any, strategy: FSDPStrategy, compute_dtype: torch.dtype) -> FullyShardedDataParallel:
    """A language model whose layers are each gathered for their own pass only.

    Args:
        model: With its output head.
        strategy: Says how to split, and where to.
        compute_dtype: Type that gathered weights come in; gradients are summed in float32.
    """
    model.forward = MethodType(response_logprobs, model)  # FSDP1 gathers for forward alone, and no other pass is made
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in layers(model)}),
        use_orig_params=True,
        mixed_precision=MixedPrecision(compute_dtype, torch.float32, cast_forward_inputs=False),
        sharding_strategy=strategy.sharding_strategy,
        cpu_offload=strategy.cpu_offload,
        device_id=strategy.root_device,
    )
    wrapped.response_logprobs = wrapped.__call__  # type: ignore[assignment]
    return wrapped


def flat_weights(model: FullyShardedDataParallel) -> Iterator[tuple[str, Tensor]]:
    """Copies of the whole weights by checkpoint name, gathered layer by layer. A collective."""
    for path, unit in model.named_modules():
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        inner = [f"{_clean(name)}." for name, module in unit.named_modules() if name and _is_unit(module)]
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            for name, parameter in unit.named_parameters():
                if not _clean(name).startswith(tuple(inner)):
                    # a copy: the gathered weights are gone after this unit, and an engine may use them later
                    yield _clean(f"{path}.{name}".lstrip(".")), parameter.detach().clone()


def _is_unit(module: Any) -> bool:
    return isinstance(module, FullyShardedDataParallel)


def _clean(name: str) -> str:
    """A parameter's or module's name without the wrappers'."""
    return f"{name}.".replace(WRAPPER, "")[:-1]
