"""A policy's weights in checkpoint form, which engines other than transformers load.

transformers 5 loads many models into parameters other than their checkpoints have: experts come as one tensor each and
are packed into tensors of all experts, and names change. Its own conversion, reversed, restores the checkpoint form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

NamedTensors = Iterable[tuple[str, Tensor]]


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
