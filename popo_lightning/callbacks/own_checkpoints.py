"""Names checkpoints by the iterations done, and removes those of a resumed run as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from popo_lightning.callbacks.run_keeper import RunKeeper
from popo_lightning.core.run_data import data_module
from popo_lightning.core.trainer_callbacks import callback_of, callbacks_of
from popo_lightning.runs.folder import progress

ITERATION, MINIBATCH = "iteration", "minibatch"
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


class OwnCheckpoints(ModelCheckpoint):
    """ModelCheckpoint that names checkpoints by iterations, and also removes the one that the run resumed from.

    It removes that one if it is in its own folder. Lightning's keeps it, so that each resume would leave one more on
    the disk. The arguments are ModelCheckpoint's.
    """

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """Like Lightning's, but :func:`name_of` is the default. A filename may contain {iteration} and {minibatch}."""
        return super().format_checkpoint_name(metrics, filename or self.filename or name_of(metrics), ver, prefix)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        return super()._monitor_candidates(trainer) | counters(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Finds the callback's state if the run has another schedule of saving now, or its folder another place."""
        states = checkpoint.get("callbacks", {})
        state = states.get(self.state_key) or self._of_another_schedule(trainer, states)
        if state is None or not self.dirpath or not _is_local_file_protocol(self.dirpath):
            return
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve().parent == Path(self.dirpath).resolve():
            state = moved(state, self.dirpath)
        states[self.state_key] = trainer.strategy.broadcast(state)  # a node may lack files that another one has

    def _of_another_schedule(self, trainer: L.Trainer, states: Mapping[str, Any]) -> Any:
        """The only state of such a callback with the same metric that no callback of this trainer has, or None."""
        others = {callback.state_key for callback in callbacks_of(trainer)}
        kind = f"{type(self).__qualname__}{{'monitor': {self.monitor!r}, 'mode': {self.mode!r}, "
        found = [state for key, state in states.items() if str(key).startswith(kind) and key not in others]
        return found[0] if len(found) == 1 else None

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Whether `previous` is another checkpoint than `current` in this callback's folder; elsewhere all stay.

        The checkpoint of another run that this one began from stays in any folder. So does one with the optimizer's
        state if only weights are saved now.
        """
        if previous == current:
            return False
        if not _is_local_file_protocol(previous):
            return True
        place, folder = Path(previous).absolute(), Path(str(self.dirpath)).absolute()
        resumed = trainer.ckpt_path is not None and place == Path(trainer.ckpt_path).absolute()
        if place == _origin(trainer) or (resumed and self.save_weights_only):
            return False
        return place.parent == folder


def counters(trainer: L.Trainer) -> dict[str, Tensor]:
    """Counts the iterations done and the minibatches done of the next one, for names of checkpoints.

    Args:
        trainer: Trainer between two minibatches, or at the end of an iteration.
    """
    data = data_module(trainer)
    left = len(getattr(data, "pending", ()))
    begun = getattr(data, "iteration", trainer.current_epoch + 1)
    done, steps = progress(begun, getattr(data, "steps", 0), left)
    return {ITERATION: torch.tensor(done), MINIBATCH: torch.tensor(steps)}


def name_of(metrics: Mapping[str, Any]) -> str:
    """Returns `iteration-0015`, or `iteration-0015-minibatch-2` if two minibatches of the next iteration are done.

    Args:
        metrics: The counts of :func:`counters`, or at least Lightning's epoch.
    """
    done = int(metrics.get(ITERATION, int(metrics.get("epoch", -1)) + 1))
    steps = int(metrics.get(MINIBATCH, 0))
    return f"{ITERATION}-{done:04d}" + (f"-{MINIBATCH}-{steps}" if steps else "")


def _origin(trainer: L.Trainer) -> Path | None:
    """The checkpoint of another run that the trainer's run began from."""
    keeper = callback_of(trainer, RunKeeper)
    return None if keeper is None or keeper.record.origin is None else Path(keeper.record.origin["checkpoint"])


def moved(state: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """State of a ModelCheckpoint whose folder has been moved or copied; unchanged if a best checkpoint is missing."""
    old, folder = str(state.get("dirpath")), str(folder)

    def there(path: str) -> str:
        return str(Path(folder, Path(path).relative_to(old))) if path and Path(path).is_relative_to(old) else path

    best = {there(path): score for path, score in state.get("best_k_models", {}).items()}
    if old == folder or not all(Path(path).exists() for path in best):
        return dict(state)
    paths = {name: there(state[name]) for name in PATHS if name in state}
    return {**state, **paths, "dirpath": folder, "best_k_models": best}
