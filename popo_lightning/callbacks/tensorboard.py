"""Chart layout and run outcomes for TensorBoard, and the run's settings for every logger."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from popo_lightning.core.hidden_secrets import without_secrets
from popo_lightning.core.trainer_callbacks import callback_of
from popo_lightning.evaluation.benchmarks import metric_names
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.metrics.table import MetricsTable
from popo_lightning.rollout.engine_rollouts import rollouts_of
from popo_lightning.runs.record import RunRecord

MULTILINE, MARGIN = "Multiline", "Margin"
ACCURACY = ("greedy", "avg", "pass")  # how an accuracy's name begins, after its last slash
# Charts under Custom Scalars: patterns of metrics, or one with its lower and upper bound.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "learning": {
        "reward": [MULTILINE, ["^reward/score$", "^reward/acc$"]],
        "held-out accuracy": [MULTILINE, ["^eval/.*/(greedy|avg|avg_at_[0-9]+|pass_at_[0-9]+)$"]],
        "effective and replayed share": [MULTILINE, ["^rollout/effective_share$", "^replay/share$"]],
        "entropy": [MULTILINE, ["^policy/entropy$"]],
    },
    "replay": {
        "effective sample size by age": [MULTILINE, ["^weight/(fresh_ess|replayed_ess|ess_age_[0-9]+)$"]],
        "weights of replayed tokens": [MULTILINE, ["^weight/replayed_(mean|p05|p50|p95|p99)$"]],
        "median weight within the 5th and 95th percentile": [
            MARGIN,
            ["weight/replayed_p50", "weight/replayed_p05", "weight/replayed_p95"],
        ],
        "share of tokens by age": [MULTILINE, ["^weight/share_age_[0-9]+$"]],
    },
    "time": {
        "seconds by phase": [MULTILINE, ["^time/(generate|verify|compose|rescore|prox|train|sync|wait|other)$"]],
        "seconds of an iteration": [MULTILINE, ["^time/iteration$"]],
    },
}
LIMITS: dict[str, dict[str, list[Any]]] = {  # charts of a run that has limits
    "limits": {
        "mean cost and bound": [MULTILINE, ["^limits/.*/(value|bound)$"]],
        "multiplier and lambda": [MULTILINE, ["^limits/.*/(multiplier|lambda)$"]],
    }
}
OUTCOMES = ("reward/score", "rollout/effective_share", "replay/share", "policy/entropy")
# Settings that tell runs apart: those in COMPARED, and all below the names in COMPARED_BELOW.
DATA = ("problems_per_iteration", "group_size", "minibatches", "ppo_epochs", "async_level")
COMPARED = tuple(f"data.{name}" for name in DATA)
SLOTS = ("advantage", "behave_weight", "trust_region", "regularizers", "aggregation", "optimizer")
COMPARED_BELOW = ("data.composer", "data.sampler", *(f"model.{name}" for name in SLOTS), "proximal")


class TensorBoardLayout(L.Callback):
    """Lays out charts and names a run's settings in TensorBoard, and logs all of them to the other loggers."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the layout, and the settings with the names of the outcome metrics."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                limited = len(rollouts_of(trainer).limits)
                logger.experiment.add_custom_scalars(LAYOUT | LIMITS if limited else LAYOUT)
                self._add(logger, trainer, ended=False)
            elif not isinstance(logger, MetricsTable):
                logger.log_hyperparams(all_settings(self.record))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Marks the run as successfully finished in TensorBoard."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                self._add(logger, trainer, ended=True)

    def _add(self, logger: Logger, trainer: L.Trainer, ended: bool) -> None:
        names = dict.fromkeys((*OUTCOMES, *accuracies(trainer)), 0.0)  # only names count: values are those logged
        experiment, started, end = hparams(compared_settings(self.record), names)
        writer = logger.experiment._get_file_writer()  # type: ignore[attr-defined]  # as Lightning's logger does
        for summary in (end,) if ended else (experiment, started):
            writer.add_summary(summary)


def accuracies(trainer: L.Trainer) -> list[str]:
    """Names of the accuracies that the run's evaluations log."""
    found = callback_of(trainer, Evaluation)
    if found is None:
        return []
    benchmarks = rollouts_of(trainer).benchmarks()
    names = metric_names({name: found.settings_of(name) for name, _ in benchmarks})
    return [name for name in names if name.rpartition("/")[2].startswith(ACCURACY)]


def all_settings(record: RunRecord) -> dict[str, Any]:
    """Settings that decide what is trained, by dotted name, without secrets: anybody may read a logger's page."""
    return without_secrets(_names(record) | {name: json.loads(value) for name, value in record.settings.items()})


def compared_settings(record: RunRecord) -> dict[str, str | float | bool]:
    """The few settings in which runs usually differ, by short names; classes are named without their module."""
    found: dict[str, str | float | bool] = {**_names(record)}
    for name, text in record.settings.items():
        value = json.loads(text)
        if value is None or not (name in COMPARED or name.startswith(tuple(f"{each}." for each in COMPARED_BELOW))):
            continue
        short = name.replace(".init_args", "")
        if short.endswith(".class_path"):
            found[short.removesuffix(".class_path")] = str(value).rpartition(".")[2]
        else:
            found[short] = value if isinstance(value, str | float | int) else json.dumps(value)
    return found


def _names(record: RunRecord) -> dict[str, Any]:
    return {"task": record.task, "method": record.method, "seed": record.seed}
