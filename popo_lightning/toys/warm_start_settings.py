"""Refuses sizes of the tiny policies that no transformer can have, or that exceed a test machine's memory."""

from __future__ import annotations

import math

from popo_lightning.core.errors import SettingError

MAX = {
    "examples": 10**9,
    "hidden_size": 8192,
    "layers": 256,
    "heads": 256,
    "intermediate_size": 65536,
    "vision_hidden_size": 8192,
    "vision_layers": 256,
    "batch_size": 65536,
}


def check_sizes(learning_rate: float, **sizes: int) -> None:
    """Raises SettingError for the first size, or the learning rate, with which no policy can be built.

    Args:
        learning_rate: Value of model.warm_start.learning_rate.
        sizes: Sizes in model.warm_start, by name.
    """
    for name, size in sizes.items():
        if not 1 <= size <= MAX[name]:
            raise SettingError(f"model.warm_start.{name} is {size}; use a number from 1 to {MAX[name]}")
    if not 0 < learning_rate < math.inf:
        raise SettingError(f"model.warm_start.learning_rate is {learning_rate}; use a number above 0, such as 0.002")
    width, heads = sizes["hidden_size"], sizes.get("heads", 1)
    if width % heads or (width // heads) % 2:
        raise SettingError(
            f"model.warm_start.hidden_size is {width} and model.warm_start.heads {heads}; each head takes an even "
            "number of the width, so make the first a multiple of twice the second"
        )
