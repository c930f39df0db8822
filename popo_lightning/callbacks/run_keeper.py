"""Writes a run's settings and identity, and gives all ranks one folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from popo_lightning.callbacks.summary import Summary
from popo_lightning.core.trainer_callbacks import callbacks_of
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.rollout.engine_rollouts import rollouts_of
from popo_lightning.rollout.report import Totals
from popo_lightning.runs.record import CONFIG, RunRecord
from popo_lightning.runs.stopping import Stopped


@dataclass(eq=False)
class RunKeeper(L.Callback):
    """Writes config.yaml and run.json once everything is loaded, so that a refused run replaces neither.

    Args:
        record: Identity of the run.
        save_config: Writes the settings to a path.
        forks: Whether the run begins from another run's checkpoint, whose counts are then reset.
        opening: Gives the sentences that the run begins with. They are printed once nothing can refuse the run.
    """

    record: RunRecord
    save_config: Callable[[Path], None]
    forks: bool = False
    opening: Callable[[L.Trainer], Iterable[str]] = lambda trainer: ()

    def __post_init__(self) -> None:
        self._folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives all ranks rank 0's folder: only rank 0 claims one, which may differ from the one they found free."""
        # Lightning has no public way to set it
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)  # type: ignore[attr-defined]
        self._folder = Path(trainer.default_root_dir).absolute()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the files, and resets the counts of a run that forks."""
        if self.forks:
            rollouts_of(trainer).totals = Totals()
            for callback in callbacks_of(trainer):
                if isinstance(callback, Evaluation):
                    callback.keep_present(rollouts_of(trainer).iteration)
                if isinstance(callback, Summary):
                    callback.begin_anew()
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = self._folder / f"draft.{CONFIG}"
            self.save_config(draft)
            draft.replace(self._folder / CONFIG)
            self.record.write(self._folder)
            for sentence in self.opening(trainer):
                print(f"popo: {sentence}", file=sys.stderr)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells the command line what the run began from, and whether the run's folder is gone."""
        if isinstance(exception, OSError) and self._folder.is_absolute() and not self._folder.exists():
            exception.gone = str(self._folder)  # type: ignore[attr-defined]
        if isinstance(exception, Stopped) and self.record.origin is not None:
            exception.began_from = str(self.record.origin["checkpoint"])

    def state_dict(self) -> dict[str, Any]:
        """Adds the run and its folder to the checkpoint, for a run that resumes from it."""
        return {"run": self.record.to_plain(), "folder": str(self._folder)}
