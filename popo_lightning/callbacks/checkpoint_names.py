"""Names checkpoints by the iterations that are done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from popo_lightning.rollout.engine_rollouts import rollouts_of
from popo_lightning.runs.progress import progress

ITERATION, MINIBATCH = "iteration", "minibatch"


def counters(trainer: L.Trainer) -> dict[str, Tensor]:
    """Counts the iterations done and the minibatches done of the next one, for names of checkpoints.

    Args:
        trainer: Trainer between two minibatches, or at the end of an iteration.
    """
    data = rollouts_of(trainer)
    done, steps = progress(data.iteration, data.steps, len(data.pending))
    return {ITERATION: torch.tensor(done), MINIBATCH: torch.tensor(steps)}


def name_of(metrics: Mapping[str, Any]) -> str:
    """Returns `iteration-0015`, or `iteration-0015-minibatch-2` if two minibatches of the next iteration are done.

    Args:
        metrics: The counts of :func:`counters`, or at least Lightning's epoch.
    """
    done = int(metrics.get(ITERATION, int(metrics.get("epoch", -1)) + 1))
    steps = int(metrics.get(MINIBATCH, 0))
    return f"{ITERATION}-{done:04d}" + (f"-{MINIBATCH}-{steps}" if steps else "")
