"""A model's weights, one at a time, with adapters merged into them, for engines and exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.ranks import full_tensor
from popo_lightning.model.lora import BASE, INPUT, OUTPUT, adapters, is_adapter


@torch.no_grad()
def merged_weights(
    model: Any, dtype: torch.dtype, given: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields a model's weights, one at a time. One with an adapter becomes W + s B A.

    The sum is made in float32 and rounded once. Sharded weights are gathered one by one, which is a collective.

    Args:
        model: Model with or without adapters.
        dtype: Type of the weights returned.
        given: Values of the adapters by name, which replace their present ones.

    Yields:
        (name without adapters, weight), in the order of the parameters.
    """
    values = adapters(model) if given is None else given
    adapted: Any = getattr(model, "adapted", None)
    targets = set() if adapted is None else set(adapted.targets)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        plain = name.replace(f"{BASE}.", ".")
        layer = plain.removesuffix(".weight")
        weight = whole_weight(parameter)
        if layer in targets:
            factors = [full_tensor(values[layer + end].detach()) for end in (OUTPUT, INPUT)]
            weight = merged_weight(weight, factors[0], factors[1], adapted.lora.scale)
        yield plain, weight.to(dtype)


def merged_weight(weight: Any, output: Tensor, entry: Tensor, scale: float) -> Tensor:
    """Returns W + s B A in float32, without a gradient.

    Args:
        weight: (out, in) frozen weight, possibly in 4 bits.
        output: (out, r) matrix B.
        entry: (r, in) matrix A.
        scale: Scale s.
    """
    whole = whole_weight(weight).float()
    return whole.addmm(output.to(whole.device, torch.float32), entry.to(whole.device, torch.float32), alpha=scale)


def whole_weight(parameter: Any) -> Tensor:
    """Returns a weight's values, gathered if it is sharded, dequantized if it is in 4 bits."""
    if in_four_bits(parameter):
        from popo_lightning.model.four_bit import dequantized

        return dequantized(parameter)
    return full_tensor(parameter.detach())


def in_four_bits(parameter: Any) -> bool:
    """Whether a weight is held in 4 bits, by :mod:`popo_lightning.model.four_bit`."""
    return getattr(parameter, "quant_state", None) is not None
