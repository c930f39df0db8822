"""A run that EarlyStopping has ended stays ended, and a resumed or forked one obeys the settings that it is given."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping

from popo_lightning.runs.resume import early_stop_in_words

log = logging.getLogger(__name__)


class EarlyStops(L.Callback):
    """Remembers in checkpoints that EarlyStopping has ended the run, and why; a resumed one then ends at once.

    It goes on where the settings of EarlyStopping in trainer.callbacks have changed since, or where it is left out.
    Lightning itself would train for one iteration more, and take the checkpoint's patience for the command's.

    Args:
        settings: Of EarlyStopping, as one text.
        forks: Whether the run begins from another run's checkpoint: what that one waited for is none of its own.
    """

    def __init__(self, settings: str, forks: bool) -> None:
        self.settings = settings
        self.forks = forks
        self._ended: dict[str, Any] | None = None
        self._patience: list[int] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Notes what a checkpoint would replace."""
        self._patience = [callback.patience for callback in _early(trainer)]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Ends a run that was ended."""
        for callback, patience in zip(_early(trainer), self._patience, strict=True):
            callback.patience = patience
            if self.forks:
                callback.wait_count = callback.stopped_epoch = 0
                callback.best_score = torch.tensor(torch.inf if callback.monitor_op == torch.lt else -torch.inf)
        if self.forks or self._ended is None or self._ended["settings"] != self.settings:
            self._ended = None
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            log.warning("%s", early_stop_in_words(trainer.default_root_dir, self._ended))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Looks whether the run has been ended, after all who measure."""
        for callback in _early(trainer):
            if trainer.should_stop and callback.stopping_reason_message and self._ended is None:
                why = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.").rstrip(".")
                iteration = trainer.datamodule.iteration  # type: ignore[attr-defined]
                self._ended = {"iteration": iteration, "why": why, "settings": self.settings}

    def state_dict(self) -> dict[str, Any]:
        """Whether the run has been ended."""
        return {"ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._ended = state_dict["ended"]


def _early(trainer: L.Trainer) -> list[EarlyStopping]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
