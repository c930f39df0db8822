"""A policy's weights for engines and exports: with adapters merged into them, and in the form of a checkpoint.

transformers 5 loads many models into parameters other than their checkpoints have: experts come as one tensor each and
are packed into tensors of all experts, and names change. Its own conversion, reversed, restores the checkpoint form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.ranks import full_tensor
from popo_lightning.model.lora import BASE, INPUT, OUTPUT, adapters, is_adapter

NamedTensors = Iterable[tuple[str, Tensor]]


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


# -- in the form of a checkpoint -------------------------------------------------------------------------------------


def as_saved(model: Any, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Yields weights with the names and shapes of the checkpoint that the model was loaded from.

    A layer's weights are converted together, because several parameters may form one tensor of a checkpoint. At most
    one layer's weights are held.

    Args:
        model: A transformers model made by from_pretrained. Without conversions its weights do not change.
        weights: Weights by parameter name; those of a layer are adjacent.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if getattr(model, "_weight_conversions", None) == []:  # from_pretrained converted nothing
        yield from weights
        return
    place, held = "", dict[str, Tensor]()
    for name, weight in weights:
        if held and _layer(name) != place:
            yield from revert_weight_conversion(model, held).items()
            held = {}
        place, held[name] = _layer(name), weight
    yield from revert_weight_conversion(model, held).items()


def saved_buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's persistent buffers, which its checkpoint has, by name."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def _layer(name: str) -> str:
    """Returns a parameter's name up to its layer's number, such as "model.layers.3"; "" outside of layers."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""
