"""Refuses a run whose ranks would begin from different checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L

from popo_lightning.core.errors import SettingError, shortened
from popo_lightning.core.ranks import all_gather_object
from popo_lightning.runs.checkpoint_files import written_at


class OneCheckpoint(L.Callback):
    """Compares the checkpoints of all ranks once they are joined, before anything is restored.

    Each rank looks for the newest checkpoint by itself. On nodes without a shared disk, or with a stale listing of one,
    the ranks may find different ones. With DDP they would train different policies, and with FSDP2 wait for each other.

    Args:
        checkpoint: Checkpoint that this rank begins from; None if it begins from the model.
        forks: Whether a new run begins from it.
    """

    def __init__(self, checkpoint: str | Path | None, forks: bool = False) -> None:
        self._own: tuple[Any, ...] | None = None
        self._words = "none"
        if checkpoint is not None:
            # the time of writing is noted in the file, so that a copy on another node's disk is the same checkpoint
            written = written_at(Path(checkpoint))
            self._own = (*written, forks)
            self._words = _words(checkpoint, written[0], forks)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Compares the ranks. A collective.

        Raises:
            SettingError: They differ. It is raised on all ranks.
        """
        everyones = all_gather_object((self._own, self._words))
        ranks: dict[Any, list[int]] = {}
        for rank, (own, _) in enumerate(everyones):
            ranks.setdefault(own, []).append(rank)
        if len(ranks) > 1:
            found = ", ".join(f"{everyones[of[0]][1]} ({_named(of)})" for of in ranks.values())
            raise SettingError(
                f"the ranks do not begin from the same checkpoint: {found}; put run.folder on a disk that all nodes "
                "share, or copy one checkpoint to each node and name it by ckpt_path"
            )


def _words(checkpoint: str | Path, nanoseconds: int, forks: bool) -> str:
    at = datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    return f"{'a new run from ' if forks else ''}'{checkpoint}', written at {at:%Y-%m-%d %H:%M:%S} UTC"


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {shortened(', '.join(map(str, ranks)), 30)}"
