"""The metrics that EarlyStopping and ModelCheckpoint may monitor: those of an iteration, and those of an evaluation.

Lightning would read them at the end of every epoch, whether or not they have been measured since. Here each measurement
notifies EarlyStopping, so that its patience counts measurements.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import SettingError
from popo_lightning.core.ranks import broadcast_object
from popo_lightning.core.trainer_callbacks import callbacks_of

EVALUATION = "eval/"
DIVERGING = ("train/", "policy/")  # once a step was taken, a non-finite number of these kinds is a measurement
WEIGHTS = ("mean", "max", "ess", "p05", "p50", "p95", "p99")
# The metrics of docs/metrics.md, without rewards, whose components a verifier names.
NAMES = (
    *(f"rollout/{name}" for name in ("effective_share", "all_wrong_share", "truncated_frac", "response_tokens")),
    "rollout/grading_failures",
    *(f"replay/{name}" for name in ("groups", "share", "trained_groups", "age_mean", "age_max", "stored_problems")),
    *(f"replay/{name}" for name in ("stored_prefixes", "restarted_groups", "restart_success", "prefix_tokens")),
    *(f"replay/{name}" for name in ("stored_responses", "injected_responses", "replayed_responses", "baseline")),
    *(f"replay/{name}" for name in ("grafted_groups", "left_out_responses")),
    *(f"pairs/{name}" for name in ("margin", "kept_margin", "accuracy", "bootstrapped_share")),
    *(f"policy/{name}" for name in ("entropy", "ratio_mean", "ratio_max", "clip_frac")),
    *(f"policy/clip_frac_{age}" for age in ("fresh", "replayed")),
    *(f"weight/{age}_{name}" for age in ("fresh", "replayed") for name in WEIGHTS),
    "weight/replayed_capped_share",
    *(f"engine/logp_gap_{name}" for name in ("mean", "max")),
    *(f"train/{name}" for name in ("loss", "grad_norm", "tokens", "learning_rate", "optimizer_steps", "value_loss")),
    *(f"train/{name}" for name in ("skipped_steps", "not_finite_metrics")),
    *(f"total/{name}" for name in ("responses", "tokens", "dynamic_sampling_responses")),
    *(f"time/{name}" for name in ("start", "generate", "verify", "compose", "rescore", "prox", "values", "train")),
    *(f"time/{name}" for name in ("sync", "other", "iteration", "wait", "ahead")),
    *(f"throughput/{name}" for name in ("train_tokens_per_second", "generated_tokens_per_second", "mfu")),
    *(f"estimate/buffer_{name}" for name in ("acc", "sampled_acc", "effective", "groups")),
    "memory/peak_gib",
)
KINDS = {name.partition("/")[0] for name in NAMES} | {"reward", "region", "eval", "limits"}
REWARDS = ("reward/score", "reward/acc", "reward/format", "reward/overlong")
LIMITS = r"limits/[^/]+/(value|bound|lambda|multiplier|violated)"
OPEN = re.compile(rf"weight/(ess|share)_age_\d+|region/\w+|reward/\w+|{LIMITS}")  # which ones exist depends on the run
# Metrics that an iteration has only if something was replayed, sampled or waited for.
SOMETIMES = re.compile(
    r"(rollout|weight|engine|time|throughput|pairs|estimate)/\w+|policy/clip_frac_\w+|region/pair_\w+"
    r"|replay/(age_\w+|restart_success|prefix_tokens|baseline)"
)

log = logging.getLogger(__name__)


def watchers(trainer: L.Trainer) -> Iterator[tuple[EarlyStopping | ModelCheckpoint, str, str]]:
    """Yields each callback that watches a metric, the setting that names the metric, and the metric."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            yield callback, f"the monitor of {type(callback).__name__} in trainer.callbacks", callback.monitor
        elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            yield callback, "checkpoint.monitor", callback.monitor


def check_monitors(trainer: L.Trainer, ours: bool) -> None:
    """Raises SettingError for a metric that no iteration logs, before a model loads.

    Args:
        trainer: Trainer with its callbacks.
        ours: Whether composer and trust region are this project's. Foreign ones, and foreign callbacks, may report
            under their own names.
    """
    callbacks = callbacks_of(trainer)
    ours = ours and all(type(each).__module__.startswith(("popo_lightning.", "lightning.")) for each in callbacks)
    for _, setting, name in watchers(trainer):
        known = name in NAMES or name.startswith(EVALUATION) or OPEN.fullmatch(name)
        if ours and not known:
            raise _unknown(setting, name, [*NAMES, *REWARDS])


def reports_are_ours(policy: Any, data: Any) -> bool:
    """Returns whether composer and trust region are this project's; foreign ones report under their own names."""
    parts = (data.composer, policy.objective.trust_region)
    return all(type(part).__module__.startswith("popo_lightning.") for part in parts)


def check_evaluation_monitors(trainer: L.Trainer, names: Iterable[str], every_n_iterations: int) -> None:
    """Raises SettingError for a metric that no evaluation has, or checkpoints of weights that were not evaluated.

    Args:
        trainer: Trainer with its callbacks.
        names: Names of an evaluation's metrics.
        every_n_iterations: Iterations between evaluations; 0 means none between the first and the last.
    """
    known = list(names)
    for callback, setting, name in watchers(trainer):
        if not name.startswith(EVALUATION):
            continue
        if name not in known:
            raise _unknown(setting, name, known)
        if not every_n_iterations:
            raise SettingError(
                f"{setting} is '{name}', but evaluation.every_n_iterations is 0, so it is measured before and after "
                "training only; set it to a number of iterations"
            )
        every = getattr(callback, "_every_n_epochs", every_n_iterations)
        if every % every_n_iterations or getattr(callback, "_every_n_train_steps", 0):
            raise SettingError(
                f"{setting} is '{name}', which is measured every {every_n_iterations} iterations "
                f"(evaluation.every_n_iterations), but checkpoints are written in between (checkpoint.every_n_epochs "
                f"is {every or 'null'}); make the second a multiple of the first"
            )


def settle_stopping(trainer: L.Trainer) -> None:
    """Lets EarlyStopping check in Lightning's hook for the end of a validation, which `consult` calls."""
    for callback, _, _ in watchers(trainer):
        if isinstance(callback, EarlyStopping):
            callback._check_on_train_epoch_end = False


def publish(trainer: L.Trainer, module: L.LightningModule, metrics: Mapping[str, float], learned: bool) -> None:
    """Gives an iteration's metrics to the callbacks that monitor them. A collective.

    Args:
        trainer: Trainer of this rank.
        module: The policy.
        metrics: Metrics of the iteration; only rank 0's are complete, and they are used.
        learned: Whether an optimizer step was taken.

    Raises:
        SettingError: A callback monitors a metric that neither this iteration nor a later one has.
    """
    told = broadcast_object(dict(metrics))
    names = [
        (setting, name)
        for callback, setting, name in watchers(trainer)
        if not name.startswith(EVALUATION) and getattr(callback, "strict", True)
    ]
    # Earlier values do not belong to this iteration, except for metrics that a foreign callback has logged.
    logged = {name for name in trainer.callback_metrics if name.partition("/")[0] not in KINDS}
    missing = {name: math.nan for _, name in names if name not in told and name not in logged}
    values = {name: torch.tensor(value) for name, value in (told | missing).items()}
    trainer.callback_metrics.update(values)
    for setting, name in names:
        if learned and name in missing and not _may_come(name, told):
            raise _unknown(setting, name, told)
    consult(trainer, module, [name for name, value in told.items() if _says_something(name, value, learned)])


def consult(trainer: L.Trainer, module: L.LightningModule, names: Iterable[str]) -> None:
    """Tells EarlyStopping that metrics have been measured, and says once if it stops the run."""
    measured = set(names)
    for callback, _, name in watchers(trainer):
        if not isinstance(callback, EarlyStopping) or name not in measured:
            continue
        stopping = trainer.should_stop
        callback.on_validation_end(trainer, module)  # decides for all ranks together
        if trainer.should_stop and not stopping and trainer.is_global_zero:
            message = str(callback.stopping_reason_message or "").removesuffix(" Signaling Trainer to stop.")
            log.warning("this iteration is the last: %s", message)


def _says_something(name: str, value: float, learned: bool) -> bool:
    return math.isfinite(value) or (learned and name.startswith(DIVERGING))


def _may_come(name: str, told: Iterable[str]) -> bool:
    """Returns whether a later iteration may have a metric that this one, in which the policy learned, lacks."""
    sampled = any(other.startswith("reward/") for other in told)
    return SOMETIMES.fullmatch(name) is not None or (name.startswith("reward/") and not sampled)


def _unknown(setting: str, name: str, known: Iterable[str]) -> SettingError:
    there = list(known)
    return SettingError(
        f"{setting} is '{name}', which is never logged; " + did_you_mean(name, there, f"there is {', '.join(there)}")
    )
