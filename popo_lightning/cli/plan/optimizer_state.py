"""Measures what an optimizer keeps per parameter, with one step on a small parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIDE = 64  # side of the square parameter that the step is taken on


@dataclass(frozen=True)
class OptimizerState:
    """Bytes per trained parameter.

    Args:
        bytes_kept: Bytes kept from the first step on.
        copies_in_step: Copies of all weights that exist during a step; 0 if parameters are stepped one by one, or by a
            fused kernel.
        notes: Assumptions that were made.
    """

    bytes_kept: float
    copies_in_step: int
    notes: tuple[str, ...] = ()


ADAM = OptimizerState(8.0, 1)  # with float32 weights on a GPU


def optimizer_state(make: Callable[..., Any], dtype: torch.dtype, on_gpu: bool) -> OptimizerState:
    """Measures on the CPU what an optimizer keeps and needs.

    Args:
        make: Makes the optimizer from parameter groups.
        dtype: dtype of the weights.
        on_gpu: Whether it steps on a GPU: torch then takes all parameters at once unless `foreach` is false.
    """
    parameter = torch.nn.Parameter(torch.zeros(SIDE, SIDE, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = make([{"params": [parameter]}])
        settings = optimizer.param_groups[0]
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, for minutes
            optimizer.step()
    except Exception as error:  # a user's class may need something that is missing here
        note = (
            f"model.optimizer takes no step on a small parameter ({type(error).__name__}): as many bytes as Adam keeps "
            "are assumed"
        )
        return OptimizerState(ADAM.bytes_kept, int(on_gpu), (note,))
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.ndim]
    size = sum(value.nbytes for value in kept) / parameter.numel()
    at_once = on_gpu and not settings.get("fused") and settings.get("foreach", False) in (None, True)
    return OptimizerState(size, int(at_once))
