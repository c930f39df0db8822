"""The trainer's precision and strategy; shards a model over the ranks by FSDP2, for ModelParallelStrategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from popo_lightning.core.errors import SettingError
from popo_lightning.model.loading import layers
from popo_lightning.model.scoring import response_logprobs, response_states

PRECISIONS = ("32-true", "bf16-mixed")
LIGHTNINGS_NAMES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}  # Lightning's full names of precisions


def check_precision(given: Any) -> str:
    """Lightning's full name of trainer.precision; raises SettingError for an unsupported one."""
    precision = LIGHTNINGS_NAMES.get(str(given), str(given))
    if precision not in PRECISIONS:
        raise SettingError(
            f"trainer.precision is '{precision}'; use {' or '.join(PRECISIONS)} (and model.dtype bfloat16 for bfloat16 "
            "weights), since the engine and the clipping of gradients follow no other"
        )
    return precision


def settle_strategy(strategy: Strategy, ranks: int) -> None:
    """Sets options that the user left open and for which Lightning's default does not fit, before processes join.

    FSDP2's mesh becomes all ranks x 1, because every rank trains on its own responses. DDP's gradients become views of
    the buckets it sends instead of copies, which saves 4 bytes per parameter.

    Args:
        strategy: The trainer's strategy.
        ranks: Number of processes of the run.
    """
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
    if isinstance(strategy, ModelParallelStrategy):
        if strategy._data_parallel_size == "auto":
            strategy._data_parallel_size = ranks
        if strategy._tensor_parallel_size == "auto":
            strategy._tensor_parallel_size = 1


def check_sharding(strategy: Strategy, ranks: int) -> None:
    """Raises SettingError for strategies that would be silently wrong, or wait forever, over several ranks.

    Args:
        strategy: The trainer's strategy, after :func:`settle_strategy`.
        ranks: Number of processes of the run.
    """
    if isinstance(strategy, FSDPStrategy):
        raise SettingError(
            "trainer.strategy is FSDPStrategy, Lightning's FSDP1; use lightning.pytorch.strategies."
            "ModelParallelStrategy (FSDP2), as configs/scale/fsdp2.yaml does"
        )
    if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        raise SettingError(
            "trainer.strategy.static_graph is true, but the passes of a step differ in number; leave it out"
        )
    start = getattr(strategy, "_start_method", "popen")
    if start != "popen":
        raise SettingError(
            f"trainer.strategy starts its ranks by {start}, as copies of this process, which a run cannot be made of; "
            "set it to ddp, whose ranks are processes of their own"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    data: Any = strategy._data_parallel_size
    tensor: Any = strategy._tensor_parallel_size
    if tensor != 1 or data != ranks:
        raise SettingError(
            f"trainer.strategy is ModelParallelStrategy with data_parallel_size {data} and tensor_parallel_size "
            f"{tensor}; every rank trains on responses of its own, so set them to {ranks} (trainer.devices x "
            "trainer.num_nodes) and 1, or leave both out"
        )


def check_checkpoint(checkpoint: str | None, strategy: Strategy) -> None:
    """Raises SettingError for a folder of shards that the strategy cannot read.

    Args:
        checkpoint: Value of ckpt_path.
        strategy: The trainer's strategy.
    """
    if checkpoint is not None and Path(checkpoint).is_dir() and not isinstance(strategy, ModelParallelStrategy):
        raise SettingError(
            f"ckpt_path is '{checkpoint}', a folder of shards, which only trainer.strategy ModelParallelStrategy reads "
            "(on one device too); checkpoints written with its save_distributed_checkpoint false "
            "are files for all"
        )


def shard_policy(model: Any, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shards a language model in place. Each of its layers is gathered only for its own pass.

    Args:
        model: Model with its output head; tied weights stay tied.
        mesh: Device mesh of the ranks.
        compute_dtype: Type of gathered weights. Shards and their gradients keep their own dtype; gradients are summed
            in float32.
    """
    # Scoring bypasses the model's forward, which would make all logits at once.
    _shard(model, mesh, compute_dtype, response_logprobs)


def shard_value_model(model: Any, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shards a value model like :func:`shard_policy`; its head stays float32."""
    # A pass without an image calls parts of the vision tower on their own, which needs the base's weights gathered.
    _shard(model.base, mesh, compute_dtype, response_states)
    fully_shard(model, mesh=mesh, mp_policy=_precision(torch.float32), reshard_after_forward=True)


def _shard(model: Any, mesh: DeviceMesh, compute_dtype: torch.dtype, called: Callable[..., Any]) -> None:
    """Shards a model layer by layer. Gives it the function by which it is called as a method with FSDP's hooks."""
    for part in (*layers(model), model):
        # The model is also resharded after a pass without gradient, because a weight sync may follow.
        fully_shard(part, mesh=mesh, mp_policy=_precision(compute_dtype), reshard_after_forward=True)
    setattr(model, called.__name__, MethodType(called, model))
    register_fsdp_forward_method(model, called.__name__)


def _precision(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
