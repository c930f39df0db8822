"""A key-value cache whose rows are added and removed while the others stay in place."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

ROOM = 32  # spare columns of a new or grown cache
GROWTH = 1.25  # factor by which a full cache grows, so that few steps copy it


class RowLayer(DynamicLayer):
    """Keys and values of one layer, with spare rows and columns: a step writes one column and copies none.

    Args:
        places: Maximum number of rows.
    """

    def __init__(self, places: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.places = places
        self.rows = 0
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes (R, heads, 1, size) keys and values; returns (R, heads, columns in use, size) of each."""
        self.length += 1
        self._reserve(self.length)
        found = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored[: self.rows, :, self.length - 1 : self.length] = new
            found.append(stored[: self.rows, :, : self.length])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Number of columns in use."""
        return self.length

    def put(self, prefilled: Any, of_prompt: Tensor, width: int) -> None:
        """Adds a row for each entry of of_prompt, ending at the last column in use; see :meth:`RowCache.put`."""
        if not self.is_initialized:
            self.lazy_initialization(prefilled.keys, prefilled.values)
            self.length = width
            self.keys, self.values = self._empty(prefilled.keys), self._empty(prefilled.values)
        rows = slice(self.rows, self.rows + len(of_prompt))
        begin = self.length - prefilled.keys.shape[-2]
        for stored, new in ((self.keys, prefilled.keys), (self.values, prefilled.values)):
            stored[rows, :, :begin] = 0  # masked, but 0 times nan is nan
            stored[rows, :, begin : self.length] = new[of_prompt]
        self.rows += len(of_prompt)

    def keep(self, rows: int, sources: Tensor, targets: Tensor, dropped: int) -> None:
        """Copies rows over others, drops all rows after the first ones, and drops columns on the left."""
        for stored in (self.keys, self.values):
            if len(sources):
                stored[targets, :, : self.length] = stored[sources, :, : self.length]
            if dropped:
                stored[:rows, :, : self.length - dropped] = stored[:rows, :, dropped : self.length].clone()
        self.rows = rows
        self.length -= dropped

    def _reserve(self, columns: int) -> None:
        if columns > self.keys.shape[-2]:
            before = self.keys, self.values
            self.keys, self.values = self._empty(self.keys), self._empty(self.values)
            for stored, old in zip((self.keys, self.values), before, strict=True):
                stored[: self.rows, :, : columns - 1] = old[: self.rows, :, : columns - 1]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(self.places, like.shape[1], int(self.length * GROWTH) + ROOM, like.shape[3])


class RowCache(Cache):
    """The caches of all layers. Rows occupy the first places, and all end at the last column in use.

    Args:
        places: Maximum number of rows.
    """

    def __init__(self, places: int) -> None:
        super().__init__(layer_class_to_replicate=partial(RowLayer, places))

    def put(self, prefilled: DynamicCache, of_prompt: Tensor, width: int) -> None:
        """Adds rows after the present ones.

        Args:
            prefilled: Cache with one row per prompt; all rows end at its last column. Emptied, to save memory.
            of_prompt: (R,) row of `prefilled` that each new row begins with.
            width: Columns in use if the cache is empty; at least the longest prompt.
        """
        for index, layer in enumerate(prefilled.layers):
            if index == len(self.layers):
                self.layers.append(self.layer_class_to_replicate())
            self.layers[index].put(layer, of_prompt, width)
            layer.reset()

    def keep(self, rows: int, sources: Tensor, targets: Tensor, dropped: int) -> None:
        """Copies rows at sources to targets, drops all rows after the first `rows`, and drops columns on the left."""
        for layer in self.layers:
            layer.keep(rows, sources, targets, dropped)
