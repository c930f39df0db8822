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
    """Weights under the names and in the shapes of the checkpoint that the model was loaded from.

    A layer's weights are converted together, since several parameters may make one tensor of a checkpoint; no more
    than one layer's are held.

    Args:
        model: Of transformers, as from_pretrained made it; without its conversions weights stay as they are.
        weights: By parameter name, those of a layer side by side.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if getattr(model, "_weight_conversions", None) == []:  # as from_pretrained leaves it where nothing was converted
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
    """A model's buffers that its checkpoint has, by name."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def _layer(name: str) -> str:
    """The beginning of a parameter's name, up to its layer's number: "model.layers.3"; "" outside of layers."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""
