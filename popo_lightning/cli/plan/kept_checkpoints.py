"""How many checkpoints a run leaves on the disk, including that of its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from popo_lightning.cli.plan.run_settings import RunSettings


@dataclass(frozen=True)
class OnDisk:
    """Checkpoints on the disk.

    Args:
        kept: Maximum number at the end.
        at_once: Maximum number while one is written: the new one exists before an older one is removed.
    """

    kept: int
    at_once: int


def on_disk(run: RunSettings) -> OnDisk | None:
    """Checkpoints that a run keeps; None if it keeps none, or ever more of them.

    Every run ends with a checkpoint, however seldom others are due.

    Args:
        run: Settings of the run.
    """
    beside, best = int(run.checkpoint_last_beside), run.checkpoints_kept
    an_iteration = run.minibatches * run.ppo_epochs
    steps, every = run.iterations * an_iteration, run.checkpoint_every_steps
    every = every or (run.checkpoint_every or 0) * an_iteration
    if not (best or beside) or (best < 0 and not run.iterations):
        return None
    due: float = 0 if not every else steps // every if run.iterations else math.inf
    at_the_end = bool(run.iterations and (not every or steps % every))
    written = due if beside else due + at_the_end
    kept = written if best < 0 else min(written, best)
    replaced = kept < written or (beside and due + at_the_end > 1)
    return OnDisk(int(kept) + beside, int(kept) + beside + bool(replaced))


def settings_of(checkpoint: Any) -> dict[str, Any]:
    """The settings of a plan that concern checkpoints.

    Args:
        checkpoint: Settings of class `checkpoint`.
    """
    by_steps, by_iterations = checkpoint.every_n_train_steps, checkpoint.every_n_epochs
    if by_iterations is None and not by_steps:
        by_iterations = 1  # Lightning's default
    off = not checkpoint.save_top_k and not checkpoint.save_last
    beside = not off and (bool(checkpoint.save_last and checkpoint.save_last != "link") or bool(checkpoint.monitor))
    return {
        "checkpoint_every": by_iterations,
        "checkpoint_every_steps": by_steps,
        "checkpoints_kept": checkpoint.save_top_k,
        "checkpoint_last_beside": beside,
        "checkpoint_has_optimizer": not checkpoint.save_weights_only,
    }
