"""A key-value cache whose rows come and go while others stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # columns to spare, and
GROWTH = 1.25  # by how much a full cache grows, so that few steps copy it


class RowLayer(DynamicLayer):
    """Keys and values of one layer, with columns to spare on the right: a step writes one and copies none."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes (R, heads, new columns, size) keys and values; returns all."""
        if not self.is_initialized:  # the prompts: rebuilt with room before the first step
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self.length = key_states.shape[-2]
            return key_states, value_states
        before, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.keys.shape[-2]:
            self.keys, self.values = self._grown(self.keys, before), self._grown(self.values, before)
        self.keys[..., before : self.length, :] = key_states
        self.values[..., before : self.length, :] = value_states
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def _grown(self, stored: Tensor, used: int) -> Tensor:
        rows, heads, _, size = stored.shape
        grown = stored.new_empty(rows, heads, int(self.length * GROWTH) + ROOM, size)
        grown[..., :used, :] = stored[..., :used, :]
        return grown

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length


class RowCache(Cache):
    """The layers of a model, made as it first runs. All rows end at the last column."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RowLayer)


def gathered(parts: Sequence[tuple[RowCache, Tensor]], width: int) -> RowCache:
    """Rows of several caches in one, which takes the others' place: each layer of theirs is dropped once copied.

    Args:
        parts: Caches with the rows wanted of each, some maybe several times.
        width: Columns; what is left of them is dropped, and what a cache lacks on its left is 0.
    """
    made = RowCache()
    for index in range(len(parts[0][0].layers)):
        layers: list[tuple[Any, Tensor]] = [(cache.layers[index], rows) for cache, rows in parts]
        layer = RowLayer()
        layer.lazy_initialization(layers[0][0].keys, layers[0][0].values)
        layer.keys = _aligned([(each.keys[..., : each.length, :], rows) for each, rows in layers], width)
        layer.values = _aligned([(each.values[..., : each.length, :], rows) for each, rows in layers], width)
        layer.length = width
        made.layers.append(layer)
        for each, _ in layers:
            each.reset()
    return made


def _aligned(parts: Sequence[tuple[Tensor, Tensor]], width: int) -> Tensor:
    _, heads, _, size = parts[0][0].shape
    made = parts[0][0].new_empty(sum(len(rows) for _, rows in parts), heads, width + ROOM, size)
    start = 0
    for stored, rows in parts:
        stored = stored[..., max(0, stored.shape[-2] - width) :, :]
        here = made[start : start + len(rows)]
        here[..., : width - stored.shape[-2], :] = 0  # never seen, but 0 times what is not a number is none either
        here[..., width - stored.shape[-2] : width, :] = stored[rows]
        start += len(rows)
    return made
