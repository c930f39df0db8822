"""The numbers of an iteration: computed once, logged, and left for whoever shows them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from popo_lightning.errors import SettingError
from popo_lightning.metrics import effective_sample_size
from popo_lightning.ranks import from_all, to_first

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
QUANTILE_SAMPLE = 1_000_000  # torch.quantile refuses more than 16 million values, and this many say enough

log = logging.getLogger(__name__)


class Monitor(L.Callback):
    """Logs every iteration's metrics at step = iteration, to all loggers.

    It also raises the alarm when engine and policy drift apart: on fresh rows, before any step, their log-probs of
    the same tokens should agree but for rounding.

    Args:
        gap_warning: Mean absolute difference in nats a token above which a warning is given. null takes 1e-3 where
            float32 is computed in, where rounding gives 1e-6, and 0.05 for others, where it gives about 1e-2.
        gap_error: The same, but the run stops; null never stops it.
    """

    def __init__(self, gap_warning: float | None = None, gap_error: float | None = None) -> None:
        for name, value in (("gap_warning", gap_warning), ("gap_error", gap_error)):
            if value is not None and value <= 0:
                raise SettingError(f"monitor.{name} is {value}; use a positive number of nats, or null")
        self.gap_warning = gap_warning
        self.gap_error = gap_error
        self._tokens: list[dict[str, Tensor]] = []
        self._steps: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Goes on with an iteration that a checkpoint interrupted: Lightning starts, or ends, it no second time."""
        self.on_train_epoch_start(trainer, pl_module)
        self._began -= sum(step["seconds"] for step in self._steps)
        if len(self._steps) == trainer.datamodule.steps:  # type: ignore[attr-defined]
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Starts the iteration's wall clock, which the engine's start does not count against."""
        self._began = time.perf_counter()
        self._start_before = trainer.datamodule.start_seconds  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the clock of the training step."""
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Collects the step's tokens."""
        self._tokens += outputs["tokens"]
        step = {name: float(value) for name, value in outputs.items() if name not in ("tokens", "region")}
        step |= {f"region/{name}": value for name, value in outputs.get("region", {}).items()}
        self._steps.append(step | {"seconds": time.perf_counter() - self._step_began, "first": float(batch.index == 0)})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Computes and logs."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        metrics = data.rollout_metrics | data.totals.metrics() | self._training_metrics(trainer)
        metrics |= self._seconds(data)
        self._tokens, self._steps = [], []
        pl_module.iteration_metrics = metrics
        for logger in trainer.loggers:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            logger.log_metrics(finite, step=data.iteration)
        exact = pl_module.compute_dtype == torch.float32
        self._check_gap(metrics.get("engine/logp_gap_mean", 0.0), self.gap_warning or (1e-3 if exact else 0.05))

    def _training_metrics(self, trainer: L.Trainer) -> dict[str, float]:
        steps = [_of_all_ranks(of_ranks) for of_ranks in zip(*from_all(self._steps), strict=True)]
        stepped = [step for step in steps if step["stepped"]]
        metrics = {
            "train/optimizer_steps": float(trainer.global_step),
            "train/loss": _mean([step["mean_loss"] for step in stepped]),
            "train/grad_norm": _mean([step["grad_norm"] for step in stepped]),
            "train/learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
        }
        names = {"value_loss": "train/value_loss"}
        names |= {name: name for step in stepped for name in step if name.startswith("region/")}
        for name, shown in names.items():
            values = [step[name] for step in stepped if name in step]
            metrics |= {shown: _mean(values)} if values else {}
        parts = [part for of_rank in to_first(self._tokens) for part in of_rank]
        if not parts:
            return metrics
        tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return metrics | token_metrics(tokens)

    def _seconds(self, data: Any) -> dict[str, float]:
        seconds = data.clock.take()
        before_steps = seconds.get("prox", 0.0) + seconds.get("values", 0.0)
        seconds["train"] = sum(step["seconds"] for step in self._steps) - before_steps
        whole = time.perf_counter() - self._began - (data.start_seconds - self._start_before)
        inside = sum(value for name, value in seconds.items() if name != "start")
        seconds["other"] = whole - inside
        return {f"seconds/{name}": value for name, value in seconds.items()} | {"seconds/iteration": whole}

    def _check_gap(self, gap: float, warning: float) -> None:
        if self.gap_error is not None and gap > self.gap_error:
            raise RuntimeError(
                f"engine and policy disagree by {gap:.3g} nats a token on average (gap_error {self.gap_error}): the "
                "engine does not have the policy's weights, or samples from another distribution"
            )
        if gap > warning:
            log.warning(
                "engine and policy disagree by %.3g nats a token on average; above %.3g the behaviour log-probs are "
                "not to be trusted: compare dtypes, and check that the weight sync covers every tensor",
                gap,
                warning,
            )

    def state_dict(self) -> dict[str, Any]:
        """What is collected of an iteration that a checkpoint interrupts."""
        return {"tokens": self._tokens, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._tokens, self._steps = state_dict["tokens"], state_dict["steps"]


def token_metrics(tokens: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of an iteration's response tokens.

    Args:
        tokens: Flat (N,) tensors ratio, clipped, weight_raw, weight, entropy, gap, fresh, age.
    """
    fresh = tokens["fresh"]
    metrics = {
        "policy/entropy": float(tokens["entropy"].mean()),
        "policy/ratio_mean": float(tokens["ratio"].mean()),
        "policy/ratio_max": float(tokens["ratio"].max()),
        "policy/clip_share": float(tokens["clipped"].float().mean()),
        "train/tokens": float(len(fresh)),
    }
    for name, rows in (("fresh", fresh), ("replayed", ~fresh)):
        if rows.any():
            metrics[f"policy/clip_share_{name}"] = float(tokens["clipped"][rows].float().mean())
            raw = tokens["weight_raw"][rows]
            metrics |= {f"weight/{name}_{label}": value for label, value in _spread(raw).items()}
            metrics[f"weight/{name}_ess"] = effective_sample_size(raw)
    if (~fresh).any():
        capped = tokens["weight"] < tokens["weight_raw"]
        metrics["weight/replayed_capped_share"] = float(capped[~fresh].float().mean())
    for age in tokens["age"][~fresh].unique().tolist():
        rows = ~fresh & (tokens["age"] == age)
        metrics[f"weight/ess_age_{age}"] = effective_sample_size(tokens["weight_raw"][rows])
    gap = tokens["gap"][fresh].abs()
    gap = gap[~gap.isnan()]  # where the policy that sampled is not at hand
    if len(gap):
        metrics["engine/logp_gap_mean"] = float(gap.mean())
        metrics["engine/logp_gap_max"] = float(gap.max())
    return metrics


def _spread(values: Tensor) -> dict[str, float]:
    if len(values) > QUANTILE_SAMPLE:
        values = values[:: len(values) // QUANTILE_SAMPLE + 1]
    quantiles = torch.quantile(values, torch.tensor(list(QUANTILES.values())))
    return {"mean": float(values.mean()), "max": float(values.max())} | dict(
        zip(QUANTILES, quantiles.tolist(), strict=True)
    )


def _of_all_ranks(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """One step, of which each rank's losses are divided by the tokens of all, times the ranks; the rest is the same."""
    losses = {name: _mean([step[name] for step in steps]) for name in ("mean_loss", "value_loss") if name in steps[0]}
    return steps[0] | losses


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
