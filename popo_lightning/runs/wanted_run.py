"""The training run that a command asks for: the `run` settings, and the others that decide where it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lightning.runs.record import RunRecord, checkpoint_every, decisive_settings, new_record


@dataclass
class RunSettings:
    """Names of a run and where it writes.

    Args:
        task: Name of the task, for folders and tables.
        method: Name of the method, for folders and tables.
        root: Folder of all runs.
        folder: Folder of this run; null makes root/task/method-seedN.
        resume: Resume from the newest checkpoint in the run's folder, or start the run if there is none yet. Without
            it, ckpt_path continues a run in its folder only if all settings are that run's; otherwise it begins a new
            run.
    """

    task: str = "task"
    method: str = "method"
    root: str = "runs"
    folder: str | None = None
    resume: bool = False


@dataclass(frozen=True)
class WantedRun:
    """The training run that a command asks for.

    Args:
        folder: Setting run.folder.
        root: Setting run.root.
        resume: Setting run.resume.
        checkpoint: Setting ckpt_path.
        checkpoints: Setting checkpoint.dirpath.
        max_epochs: Setting trainer.max_epochs.
        record: Identity of a new run with these settings.
        stopping: Settings of EarlyStopping in trainer.callbacks, as one text.
    """

    folder: Path | None
    root: str
    resume: bool
    checkpoint: Path | None
    checkpoints: Path | None
    max_epochs: int | None
    record: RunRecord
    stopping: str = "[]"

    @property
    def base(self) -> Path:
        """The usual folder, root/task/method-seedN."""
        return Path(self.root) / self.record.task / f"{self.record.method}-seed{self.record.seed}"

    @property
    def limit(self) -> float:
        """Maximum number of iterations."""
        return float("inf") if self.max_epochs in (None, -1) else float(self.max_epochs or 0)


def wanted_run(config: Any, plain: Mapping[str, Any]) -> WantedRun:
    """The run that a parsed command asks for.

    Args:
        config: Settings of popo fit.
        plain: The same settings in plain containers.
    """
    run, kept = config.run, config.checkpoint
    steps = max(1, config.data.minibatches * config.data.ppo_epochs)
    every = checkpoint_every(kept.save_top_k, kept.every_n_epochs, kept.every_n_train_steps, steps)
    record = new_record(run.task, run.method, int(config.seed_everything), decisive_settings(plain), every)
    paths = (_path(config.ckpt_path), _path(kept.dirpath))
    limit = config.trainer.max_epochs
    return WantedRun(_path(run.folder), run.root, run.resume, *paths, limit, record, early_stopping(plain))


def _path(setting: str | None) -> Path | None:
    return None if setting is None else Path(setting)


def early_stopping(plain: Mapping[str, Any]) -> str:
    """Settings of EarlyStopping in trainer.callbacks, as one text.

    Args:
        plain: All settings of a command, in plain containers.
    """
    callbacks = plain.get("trainer", {}).get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return json.dumps([each for each in callbacks if "EarlyStopping" in str(each.get("class_path"))], sort_keys=True)
