"""Keeps a run that EarlyStopping ended from continuing; gives resumed and forked runs the command's settings."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping

from popo_lightning.core.kept_state import KeepsState
from popo_lightning.core.trainer_callbacks import callbacks_of
from popo_lightning.rollout.engine_rollouts import rollouts_of
from popo_lightning.runs.resume import early_stop_in_words

log = logging.getLogger(__name__)


class EarlyStops(KeepsState, L.Callback):
    """Saves in checkpoints that EarlyStopping ended the run, and why. A resumed run then ends at once.

    The run continues if the settings of EarlyStopping in trainer.callbacks have changed or were removed. Lightning
    itself would train one more iteration, and would replace the command's patience by the checkpoint's.

    Args:
        settings: Settings of EarlyStopping as one text.
        forks: Whether the run begins from another run's checkpoint; that run's counts of EarlyStopping are discarded.
    """

    state = ("ended",)

    def __init__(self, settings: str, forks: bool) -> None:
        self.settings = settings
        self.forks = forks
        self.ended: dict[str, Any] | None = None
        self._patience: list[int] = []

    @property
    def why(self) -> str | None:
        """Why EarlyStopping has ended the run; None if it has not."""
        return None if self.ended is None else str(self.ended["why"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Notes the patience of the settings, which a checkpoint would replace."""
        self._patience = [callback.patience for callback in _early(trainer)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores the patience of the settings, and ends a run that EarlyStopping had ended."""
        for callback, patience in zip(_early(trainer), self._patience, strict=True):
            callback.patience = patience
            if self.forks:
                callback.wait_count = callback.stopped_epoch = 0
                callback.best_score = torch.tensor(torch.inf if callback.monitor_op == torch.lt else -torch.inf)
        if self.forks or self.ended is None or self.ended["settings"] != self.settings:
            self.ended = None
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            log.warning("%s", early_stop_in_words(trainer.default_root_dir, self.ended))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes whether EarlyStopping has ended the run; comes after the callbacks that measure."""
        for callback in _early(trainer):
            if trainer.should_stop and callback.stopping_reason_message and self.ended is None:
                why = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.").rstrip(".")
                iteration = rollouts_of(trainer).iteration
                self.ended = {"iteration": iteration, "why": why, "settings": self.settings}


def _early(trainer: L.Trainer) -> list[EarlyStopping]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, EarlyStopping)]
