"""Passes signals that ask a run to stop to Lightning's loop and to generation."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from popo_lightning.runs.stopping import SIGNALS, Stopped, stop_requests


class StopSignals(L.Callback):
    """Ctrl-C, SIGTERM, SIGHUP and SLURM's requeue signal stop a run where it can resume; a second one stops it at once.

    It replaces Lightning's own handlers, which exchange tensors with other ranks while a collective may be running, and
    which save in the middle of a minibatch. It must be the first callback.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals over from Lightning, which has installed its handlers by now."""
        stop_requests(trainer).arm(_signals(trainer), trainer.is_global_zero, lambda: _kill_ranks(trainer))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Checks for a stop between two minibatches; before the first one the rollouts check."""
        if getattr(batch, "index", 0):
            stop_requests(trainer).check(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets signals stop validate, test and predict at once, since these change no weights."""
        if trainer.state.fn != "fit":
            stop_requests(trainer).arm(_signals(trainer), say=False)
            stop_requests(trainer).leave_at_once()

    on_test_start = on_predict_start = on_validation_start

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells the command line what to report."""
        if isinstance(exception, Stopped):
            exception.folder = trainer.default_root_dir
            environment = getattr(trainer.strategy, "cluster_environment", None)
            exception.launched = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
            exception.speaks = trainer.is_global_zero
        else:
            stop_requests(trainer).disarm()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restores the earlier handlers."""
        stop_requests(trainer).disarm()


def _signals(trainer: L.Trainer) -> tuple[int, ...]:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    requeue = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None
    if requeue is None and "SLURM_JOB_ID" in os.environ:  # a SLURM job whose ranks another launcher starts
        requeue = signal.SIGUSR1
    return SIGNALS if requeue is None else (*SIGNALS, requeue)


def _kill_ranks(trainer: L.Trainer) -> None:
    """Kills the ranks that this process started."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)
