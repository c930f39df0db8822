"""The minibatches of an iteration as a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import IterableDataset

from popo_lightning.core.minibatch import Minibatch


class RolloutStream(IterableDataset[Minibatch]):
    """The minibatches of one rollout iteration; one pass over it is one Lightning epoch.

    It has a length intentionally. From a loader without one, Lightning would fetch one batch ahead, and sample the next
    iteration before the last update of this one.
    """

    def __init__(self, iterate: Callable[[], Iterator[Minibatch]], steps: int) -> None:
        """
        Args:
            iterate: Begins an iteration, or continues the one that a checkpoint interrupted.
            steps: Number of minibatches of an iteration.
        """
        self._iterate = iterate
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Minibatch]:
        return self._iterate()
