"""Notes when each iteration of a `popo fit` ended, for bench_peers.py: --trainer.callbacks+=peer_clock.Clock."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L


class Clock(L.Callback):
    """Writes clock.json into the run's folder: start of training, end of each iteration, seconds of engine start."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Notes the start of training."""
        self.times = [time.time()]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Notes the end. Other callbacks' work at the end of an iteration comes later, and counts for the next one."""
        self.times.append(time.time())

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes the file."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = {"times": self.times, "engine_start": data.start_seconds}
        Path(trainer.default_root_dir, "clock.json").write_text(json.dumps(found))
