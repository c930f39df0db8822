"""A resumable point of a run: what its checkpoint holds besides the weights, kept until it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer import call
from torch import Tensor

from popo_lightning.callbacks.own_checkpoints import ITERATION, MINIBATCH, counters
from popo_lightning.core.kept_state import containers_copied
from popo_lightning.rollout.engine_rollouts import EngineRollouts, rollouts_of
from popo_lightning.rollout.rank_states import PlaceState


@dataclass(eq=False)
class ResumePlace:
    """The point after a minibatch, or after an iteration and all its hooks.

    Until the next minibatch begins, the run draws problems, takes minibatches and changes buffers, but leaves weights,
    optimizer and schedulers alone. So a checkpoint of this point can be written until the next minibatch begins.

    Args:
        batches: Minibatches of the run so far, this one included.
        finished: Whether the iteration's hooks have run as well.
        words: Description for the user.
        entries: Entries of the checkpoint.
        data: The data module's state on this rank.
        names: Iterations and minibatches done, for the checkpoint's name.
    """

    batches: int
    finished: bool
    words: str
    entries: dict[str, Any]
    data: PlaceState | None
    names: dict[str, Tensor]

    @classmethod
    def here(cls, trainer: L.Trainer, finished: bool = False) -> ResumePlace:
        """The run's present place. Not a collective."""
        data = rollouts_of(trainer)
        names = counters(trainer)
        entries = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "loops": trainer._checkpoint_connector._get_loops_state_dict(),
            "callbacks": call._call_callbacks_state_dict(trainer),
        }
        return cls(
            trainer.fit_loop.epoch_loop.total_batch_idx + 1,
            finished,
            _words(names, data),
            containers_copied(entries),
            data.place_state(anew=False) if hasattr(data, "place_state") else None,
            names,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ResumePlace) and (self.batches, self.finished) == (other.batches, other.finished)

    @property
    def counters(self) -> dict[str, Tensor]:
        """Counters for the checkpoint's name."""
        lightnings = {"epoch": self.entries["epoch"], "step": self.entries["global_step"]}
        return self.names | {name: torch.tensor(value) for name, value in lightnings.items()}

    def weights_moved(self, trainer: L.Trainer) -> bool:
        """Whether a minibatch has begun since; its steps and the hooks around them change weights."""
        return self.batches != trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def dump(self, trainer: L.Trainer, weights_only: bool, own_key: str) -> dict[str, Any]:
        """Makes the checkpoint of this place at a later time. A collective.

        Args:
            trainer: Trainer whose weights and optimizer are still those of this place.
            weights_only: Lightning's setting of that name.
            own_key: Key of the callback that saves; its state is the present one.
        """
        data = rollouts_of(trainer)
        if self.data is not None:
            data.as_of = self.data
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        finally:
            if self.data is not None:
                data.as_of = None
        own = checkpoint.get("callbacks", {}).get(own_key)
        checkpoint |= {name: value for name, value in self.entries.items() if name in checkpoint}
        if own is not None:
            checkpoint["callbacks"] = checkpoint["callbacks"] | {own_key: own}
        return checkpoint


def _words(names: dict[str, Tensor], data: EngineRollouts) -> str:
    done, steps = int(names[ITERATION]), int(names[MINIBATCH])
    return f"iteration {done + 1}, minibatch {steps} of {data.steps}" if steps else f"iteration {done}"
