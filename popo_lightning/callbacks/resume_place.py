"""A resumable point of a run: what its checkpoint holds besides the weights, kept until it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer import call
from torch import Tensor

from popo_lightning.core.kept_state import containers_copied
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
    """

    batches: int
    finished: bool
    words: str
    entries: dict[str, Any]
    data: PlaceState | None

    @classmethod
    def here(cls, trainer: L.Trainer, finished: bool = False) -> ResumePlace:
        """The place the run is at. Not a collective."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        entries = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "loops": trainer._checkpoint_connector._get_loops_state_dict(),
            "callbacks": call._call_callbacks_state_dict(trainer),
        }
        return cls(
            trainer.fit_loop.epoch_loop.total_batch_idx + 1,
            finished,
            _words(trainer, data),
            containers_copied(entries),
            data.place_state(anew=False) if hasattr(data, "place_state") else None,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ResumePlace) and (self.batches, self.finished) == (other.batches, other.finished)

    @property
    def counters(self) -> dict[str, Tensor]:
        """For the checkpoint's name."""
        return {"epoch": torch.tensor(self.entries["epoch"]), "step": torch.tensor(self.entries["global_step"])}

    def weights_moved(self, trainer: L.Trainer) -> bool:
        """Whether a minibatch has begun since: its steps, and what comes around them, move weights."""
        return self.batches != trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def dump(self, trainer: L.Trainer, weights_only: bool, own_key: str) -> dict[str, Any]:
        """The checkpoint of this place, made later. A collective.

        Args:
            trainer: Whose weights and optimizer are still those of the place.
            weights_only: As of Lightning.
            own_key: Of the callback that saves, whose state is the present one.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
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


def _words(trainer: L.Trainer, data: Any) -> str:
    iteration, left = getattr(data, "iteration", trainer.current_epoch + 1), len(getattr(data, "pending", ()))
    steps = getattr(data, "steps", 0)
    return f"iteration {iteration}" + (f", minibatch {steps - left} of {steps}" if left else "")
