"""The minibatches of an iteration as a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from popo_lightning.core.minibatch import Minibatch


class RolloutStream(IterableDataset[Minibatch]):
    """The minibatches of one rollout iteration; one pass over it is one Lightning epoch.

    It has a length intentionally. Lightning fetches one batch ahead from a loader without one, and the next iteration
    would then be sampled before the last update of this one.
    """

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return self._data.steps

    def __iter__(self) -> Iterator[Minibatch]:
        return self._data.iterate()
