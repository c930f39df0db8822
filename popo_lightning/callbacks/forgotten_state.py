"""Notices state that a proximal policy or a parameter hook keeps and no checkpoint holds."""

from __future__ import annotations

from typing import Any

import lightning as L

from popo_lightning.core.kept_state import KeepsState, Watch, check_names
from popo_lightning.core.trainer_callbacks import callbacks_of
from popo_lightning.proximal.parameter_hook import ParameterHook
from popo_lightning.proximal.snapshot import ProximalPolicy

SLOTS: dict[str, type[KeepsState]] = {"proximal": ProximalPolicy, "parameter_hook": ParameterHook}


class ForgottenState(L.Callback):
    """Warns of attributes of these callbacks that change after the start and that their ``state`` does not name."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses names of attributes that are not there, before a checkpoint gives them back."""
        for slot, callback in _in_slots(trainer):
            check_names(slot, callback)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the attributes; comes after the callbacks that it watches."""
        self._watches = [Watch(slot, callback) for slot, callback in _in_slots(trainer)]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warns once of each."""
        for watch in self._watches:
            watch.tell()


def _in_slots(trainer: L.Trainer) -> list[tuple[str, KeepsState]]:
    kept = [callback for callback in callbacks_of(trainer) if isinstance(callback, KeepsState)]
    return [(slot, callback) for callback in kept for slot, kind in SLOTS.items() if isinstance(callback, kind)]
