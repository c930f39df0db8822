"""A stand-in for another device on a machine with only a CPU: its tensors are CPU tensors that report `meta`.

As on CUDA, an operation on tensors of both devices fails, except that a tensor without dimensions may be on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")


class Other(Tensor):
    """A tensor on the other device. Its numbers are in ``here``."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Other:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=ELSEWHERE,
            requires_grad=here.requires_grad,
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Other({self.here!r})"

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Intercepts operations that create tensors or move them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class FromNumbers(TorchFunctionMode):
    """Intercepts torch.tensor, which makes a tensor on `meta` without calling a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.tensor, torch.as_tensor) or kwargs.get("device") != ELSEWHERE:
            return func(*args, **kwargs)
        return func(*args, **kwargs | {"device": torch.device("cpu")}).to(ELSEWHERE)


def computed(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    name = str(func)
    named = kwargs.get("device")
    moves = "_to_copy" in name or "copy_" in name or "_pin_memory" in name
    elsewhere = any(isinstance(value, Other) for value in tensors)
    if not moves and elsewhere:
        stray = [value for value in tensors if not isinstance(value, Other) and value.dim() > 0]
        assert not stray, f"{name} is given tensors of two devices: {[tuple(value.shape) for value in tensors]}"
    if named is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
        elsewhere = torch.device(named).type == ELSEWHERE.type
    if "aten.copy_" in name:
        elsewhere = isinstance(args[0], Other)
    found = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    if not elsewhere:
        return found
    known = {id(value.here): value for value in tensors if isinstance(value, Other)}  # for in-place operations

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Other(value)

    return tree_map(wrapped, found)


def unwrapped(value: Any) -> Any:
    return value.here if isinstance(value, Other) else value


def moved(module: torch.nn.Module) -> None:
    """Moves all parameters and buffers of a module to the other device, including tied ones."""
    seen: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in seen:
                    seen[id(parameter)] = torch.nn.Parameter(Other(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = seen[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Other(buffer)
