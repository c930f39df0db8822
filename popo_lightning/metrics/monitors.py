"""What EarlyStopping and ModelCheckpoint may monitor: the metrics of an iteration, and those of an evaluation.

Lightning would look for them at the end of every epoch, whether or not they have been measured since. Here each
measurement notifies EarlyStopping, so that its patience counts measurements.
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

from popo_lightning.core.errors import SettingError
from popo_lightning.core.nearest import did_you_mean
from popo_lightning.core.ranks import broadcast_object

EVALUATION = "eval/"
DIVERGING = ("train/", "policy/")  # of these a number that is not finite says something once a step was taken
WEIGHTS = ("mean", "max", "ess", "p05", "p50", "p95", "p99")
PHASES = (
    "start",
    "generate",
    "verify",
    "compose",
    "rescore",
    "prox",
    "train",
    "sync",
    "other",
    "iteration",
    "wait",
    "ahead",
)
# The README's table, without rewards, whose parts a verifier names.
NAMES = (
    *(f"rollout/{name}" for name in ("effective_share", "all_wrong_share", "truncated_frac", "response_tokens")),
    "rollout/grading_failures",
    *(f"replay/{name}" for name in ("groups", "share", "trained_groups", "age_mean", "age_max", "stored_problems")),
    *(f"replay/{name}" for name in ("stored_prefixes", "restarted_groups", "restart_success", "prefix_tokens")),
    *(f"replay/{name}" for name in ("stored_responses", "injected_responses", "replayed_responses", "baseline")),
    *(f"policy/{name}" for name in ("entropy", "ratio_mean", "ratio_max", "clip_frac")),
    *(f"policy/clip_frac_{age}" for age in ("fresh", "replayed")),
    *(f"weight/{age}_{name}" for age in ("fresh", "replayed") for name in WEIGHTS),
    "weight/replayed_capped_share",
    *(f"engine/logp_gap_{name}" for name in ("mean", "max")),
    *(f"train/{name}" for name in ("loss", "grad_norm", "tokens", "learning_rate", "optimizer_steps", "value_loss")),
    *(f"train/{name}" for name in ("skipped_steps", "not_finite_metrics")),
    *(f"total/{name}" for name in ("responses", "tokens", "dynamic_sampling_responses")),
    *(f"time/{name}" for name in PHASES),
    *(f"throughput/{name}" for name in ("train_tokens_per_second", "generated_tokens_per_second", "mfu")),
    "memory/peak_gib",
)
KINDS = {name.partition("/")[0] for name in NAMES} | {"reward", "region", "eval"}
REWARDS = ("reward/score", "reward/acc", "reward/format", "reward/overlong")
OPEN = re.compile(r"weight/(ess|share)_age_\d+|region/\w+|reward/\w+")  # of these, which there are depends
# What an iteration has only where something was replayed, sampled or waited for.
SOMETIMES = re.compile(
    r"(rollout|weight|engine|seconds|throughput)/\w+|policy/clip_frac_\w+"
    r"|replay/(age_\w+|restart_success|prefix_tokens|baseline)"
)

log = logging.getLogger(__name__)


def watchers(trainer: L.Trainer) -> Iterator[tuple[Any, str, str]]:
    """Callbacks that watch a metric: the callback, the setting that names the metric, and the metric."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            yield callback, f"the monitor of {type(callback).__name__} in trainer.callbacks", callback.monitor
        elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            yield callback, "checkpoint.monitor", callback.monitor


def check_monitors(trainer: L.Trainer, ours: bool) -> None:
    """Raises SettingError for a metric that no iteration logs, before a model loads.

    Args:
        trainer: With its callbacks.
        ours: Whether composer and trust region are this project's; others, and callbacks, may report under names of
            their own.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    ours = ours and all(type(each).__module__.startswith(("popo_lightning.", "lightning.")) for each in callbacks)
    for _, setting, name in watchers(trainer):
        known = name in NAMES or name.startswith(EVALUATION) or OPEN.fullmatch(name)
        if ours and not known:
            raise _unknown(setting, name, [*NAMES, *REWARDS])


def reports_are_ours(policy: Any, data: Any) -> bool:
    """Whether composer and trust region are this project's; others report under names of their own."""
    parts = (data.composer, policy.objective.trust_region)
    return all(type(part).__module__.startswith("popo_lightning.") for part in parts)


def check_evaluation_monitors(trainer: L.Trainer, names: Iterable[str], every_n_iterations: int) -> None:
    """Raises SettingError for a metric that no evaluation has, or checkpoints of weights that were not evaluated.

    Args:
        trainer: With its callbacks.
        names: Metrics of an evaluation.
        every_n_iterations: Iterations between evaluations; 0 for none between the first and the last.
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
    """EarlyStopping waits for what is measured, by way of Lightning's hook for the end of a validation."""
    for callback, _, _ in watchers(trainer):
        if isinstance(callback, EarlyStopping):
            callback._check_on_train_epoch_end = False


def publish(trainer: L.Trainer, module: Any, metrics: Mapping[str, float], learned: bool) -> None:
    """Gives an iteration's metrics to the callbacks that monitor them. A collective.

    Args:
        trainer: Of this rank.
        module: The policy.
        metrics: Of rank 0, which alone has all.
        learned: Whether an optimizer step was taken.

    Raises:
        SettingError: A metric is watched that the iteration does not have, nor a later one.
    """
    told = broadcast_object(dict(metrics))
    names = [
        (setting, name)
        for callback, setting, name in watchers(trainer)
        if not name.startswith(EVALUATION) and getattr(callback, "strict", True)
    ]
    # what was measured earlier is not of this iteration, but for what a callback of somebody's own has logged
    logged = {name for name in trainer.callback_metrics if name.partition("/")[0] not in KINDS}
    missing = {name: math.nan for _, name in names if name not in told and name not in logged}
    values = {name: torch.tensor(value) for name, value in (told | missing).items()}
    trainer.callback_metrics.update(values)
    for setting, name in names:
        if learned and name in missing and not _may_come(name, told):
            raise _unknown(setting, name, told)
    consult(trainer, module, [name for name, value in told.items() if _says_something(name, value, learned)])


def consult(trainer: L.Trainer, module: Any, names: Iterable[str]) -> None:
    """Tells EarlyStopping that metrics have been measured, and says once if it stops the run."""
    measured = set(names)
    for callback, _, name in watchers(trainer):
        if not isinstance(callback, EarlyStopping) or name not in measured:
            continue
        stopping = trainer.should_stop
        callback.on_validation_end(trainer, module)  # of all ranks together
        if trainer.should_stop and not stopping and trainer.is_global_zero:
            message = str(callback.stopping_reason_message or "").removesuffix(" Signaling Trainer to stop.")
            log.warning("this iteration is the last: %s", message)


def _says_something(name: str, value: float, learned: bool) -> bool:
    return math.isfinite(value) or (learned and name.startswith(DIVERGING))


def _may_come(name: str, told: Iterable[str]) -> bool:
    """Whether a later iteration may have what this one, in which the policy learned, has not."""
    sampled = any(other.startswith("reward/") for other in told)
    return SOMETIMES.fullmatch(name) is not None or (name.startswith("reward/") and not sampled)


def _unknown(setting: str, name: str, known: Iterable[str]) -> SettingError:
    there = list(known)
    return SettingError(
        f"{setting} is '{name}', which is never logged; " + did_you_mean(name, there, f"there is {', '.join(there)}")
    )
