"""Completes vLLM's reload_weights, which skips some weights almost silently."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

RELOAD = "vllm.model_executor.model_loader.reload.layerwise"  # logger of vLLM's module
UNDONE = "Failed to load weights"


class _Heard(logging.Handler):
    """Records the classes of layers that vLLM warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kinds: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Records the class in "CLASS: Failed to load weights"."""
        kind, _, said = record.getMessage().partition(": ")
        if said.startswith(UNDONE):
            self.kinds.add(kind)


def stale_layers(reload: Callable[[], Any], modules: Callable[[], Iterable[nn.Module]]) -> list[str]:
    """Reloads a model's weights. Returns the classes of layers that keep their old weights.

    If a layer's loader bypasses the new weights, as gpt-oss's does with experts, vLLM restores the old ones and only
    logs it. Layers without parameters, or with another layer's, have nothing to receive.

    Args:
        reload: Calls reload_weights.
        modules: Gives the model's modules after the reload.
    """
    log, heard = logging.getLogger(RELOAD), _Heard()
    level, propagate = log.level, log.propagate
    log.addHandler(heard)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        reload()
    finally:
        log.removeHandler(heard)
        log.setLevel(level)
        log.propagate = propagate
    if not heard.kinds:
        return []
    every = list(modules())
    owners = Counter(id(parameter) for module in every for parameter in module._parameters.values())
    own = {type(m).__name__ for m in every if any(p is not None and owners[id(p)] == 1 for p in m._parameters.values())}
    return sorted(heard.kinds & own)


def name_loaders(modules: Iterable[nn.Module]) -> None:
    """Gives a name to loaders that are partial functions: vLLM 0.32's reload_weights asks each loader for its name.

    MiniMax-M2's norms have such loaders, and without a name their reload ends in an AttributeError.
    """
    for module in modules:
        for parameter in module._parameters.values():
            loader: Any = getattr(parameter, "weight_loader", None)
            if isinstance(loader, partial) and not hasattr(loader, "__name__"):
                setattr(loader, "__name__", getattr(loader.func, "__name__", "loader"))  # noqa: B010  # mypy knows none


def repack(model: torch.nn.Module) -> None:
    """Packs again, on a CPU, what vLLM 0.32's reload_weights leaves unpacked or packed from old weights.

    Logits come from a packed copy of the head, which is only renewed if the head receives a weight of its own: a head
    that shares the embedding's would keep the old policy's. Experts are only packed at the start: their kernel would
    read new, unpacked weights as packed ones.
    """
    for module in list(model.modules()):
        method: Any = getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and type(module).__name__ == "ParallelLMHead":
            method.process_weights_after_loading(module)
        kernel: Any = getattr(method, "moe_kernel", None)
        packed = kernel is not None and type(method).__name__ == "UnquantizedFusedMoEMethod"
        if packed and next(module.parameters()).device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(module)
