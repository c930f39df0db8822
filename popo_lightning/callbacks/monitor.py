"""The metrics of an iteration: computed once, logged, and kept for the other callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch

from popo_lightning.core.errors import EngineGapError, SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.ranks import all_gather_object, broadcast_object, gather_object
from popo_lightning.metrics.buffer_estimate import SUMS, buffer_metrics, buffer_sums
from popo_lightning.metrics.monitors import publish
from popo_lightning.model.policy_model import policy_of
from popo_lightning.rollout.engine_gap import GapLimits
from popo_lightning.rollout.engine_rollouts import EngineRollouts, rollouts_of
from popo_lightning.training.throughput import Worker, check_peak, throughput_metrics
from popo_lightning.training.token_sums import TokenSums, token_metrics

WORK = ("row_tokens", "flops")  # numbers of a training step on one rank
BEFORE_STEPS = ("prox", "values")  # phases of a training step before its passes
# These are nan or infinite if there is nothing to measure: no replayed group, no step, no effective group so far.
UNMEASURED = ("replay/age_mean", "replay/age_max", "train/loss", "train/grad_norm", "total/dynamic_sampling_responses")

log = logging.getLogger(__name__)


class Monitor(L.Callback):
    """Logs every iteration's metrics to all loggers, at step = iteration.

    It also warns when engine and policy disagree: on fresh rows, before any step, their log-probs of the same tokens
    should be equal up to rounding.

    Args:
        gap_warning: Mean absolute log-prob difference between engine and policy, in nats per token, above which a
            warning is logged. null takes 3 times the difference measured when both were loaded, but at least 1e-3 for
            float32 (rounding gives 1e-6) and 0.05 for bfloat16 (rounding gives about 0.01, and 0.033 for some models).
        gap_error: Difference above which the run stops; a gap present from the beginning stops it before training. auto
            takes 10 times the difference measured when both were loaded, but at least 0.01 for float32 and 0.25 for
            bfloat16; after the first sync of unchanged weights it takes gap_warning. null only warns.
        peak_tflops: Peak of the GPU in dense bfloat16 TFLOP/s, for throughput/mfu. null looks the GPU up by its name.
            throughput/mfu is left out for an unknown GPU and on a CPU.
        estimate_buffer: Log estimate/buffer_acc, what the present policy would score on the replayed problems, by the
            proximal log-probs of all minibatches but the first. It costs no pass.
    """

    def __init__(
        self,
        gap_warning: float | None = None,
        gap_error: float | Literal["auto"] | None = "auto",
        peak_tflops: float | None = None,
        estimate_buffer: bool = False,
    ) -> None:
        for name, value in (("gap_warning", gap_warning), ("gap_error", gap_error)):
            if value is not None and value != "auto" and not value > 0:
                raise SettingError(f"monitor.{name} is {value}; use a positive number of nats, or null")
        self.limits = GapLimits(gap_warning, gap_error)
        self.peak_tflops = check_peak(peak_tflops)
        self.estimate_buffer = estimate_buffer
        self._tokens = TokenSums()
        self._steps: list[dict[str, float]] = []
        self._named = False  # whether the log has names of metrics that were not finite

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets the data module compare engine and policy before they train or evaluate."""
        data = rollouts_of(trainer)
        if stage == "fit" and self.estimate_buffer and data.steps < 2:
            raise SettingError(
                f"monitor.estimate_buffer is true, but data.minibatches is {data.minibatches}, whose first has no "
                "proximal log-probs; use 2 or more, or set it to false"
            )
        data.compare_engine(self.limits)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continues an interrupted iteration: Lightning does not start it again, nor end it if no step is left."""
        data = rollouts_of(trainer)
        self._worker = Worker.of_policy(policy_of(pl_module), self.peak_tflops, data.engine.take_peak_bytes)
        self.on_train_epoch_start(trainer, pl_module)
        kept = data.kept_by_ranks
        self._resume(kept.take("monitor"), trainer.global_rank, trainer.world_size)
        kept.keep("monitor", self._own)
        self._began -= sum(step["seconds"] for step in self._steps)
        if len(self._steps) == data.steps:
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the iteration's wall clock, which excludes the start of the engine."""
        self._began = time.perf_counter()
        self._start_before = rollouts_of(trainer).start_seconds

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Starts the clock of the training step."""
        self._step_began = time.perf_counter()
        self._before_began = rollouts_of(trainer).clock.seconds(*BEFORE_STEPS)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Collects the step's numbers."""
        seconds = time.perf_counter() - self._step_began
        before = rollouts_of(trainer).clock.seconds(*BEFORE_STEPS) - self._before_began
        if not outputs.get("skipped"):  # the token sums of a skipped step describe no step
            self._tokens.merge(outputs["tokens"])
        step = {name: float(value) for name, value in outputs.items() if name not in ("tokens", "region")}
        step |= {f"region/{name}": value for name, value in outputs.get("region", {}).items()}
        step |= {"seconds": seconds, "train_seconds": seconds - before, "first": float(batch.index == 0)}
        data = rollouts_of(trainer)
        if self.estimate_buffer and batch.index >= data.steps - data.minibatches:  # each group once, in the last pass
            step |= buffer_sums(batch)
        self._steps.append(step | self._worker.work(batch))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes and logs the iteration's metrics."""
        data = rollouts_of(trainer)
        learned = any(step["stepped"] for step in self._steps)
        metrics = data.rollout_metrics | data.totals.metrics() | self._training_metrics(trainer)
        metrics |= self._seconds(data)
        self._tokens, self._steps = TokenSums(), []
        metrics["train/not_finite_metrics"] = float(len(self._not_finite(metrics, data.iteration)))
        policy = policy_of(pl_module)
        policy.iteration_metrics = metrics
        for logger in trainer.loggers:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            logger.log_metrics(finite, step=data.iteration)
        publish(trainer, policy, metrics, learned)
        exact = policy.compute_dtype == torch.float32
        # the mean over all ranks' tokens, from rank 0: a rank that stopped alone would leave the others waiting
        gap = broadcast_object(metrics.get("engine/logp_gap_mean", 0.0))
        self._check_gap(gap, exact, data.gap_floor)

    def _not_finite(self, metrics: dict[str, float], iteration: int) -> list[str]:
        """Names of measured metrics that are not finite. Loggers omit them, so they are counted, and named once."""
        found = [name for name, value in metrics.items() if not math.isfinite(value) and name not in UNMEASURED]
        if found and not self._named:
            log.warning(
                "not finite in iteration %d, and so left out of the metrics: %s; train/not_finite_metrics counts them",
                iteration,
                ", ".join(f"{name} {metrics[name]}" for name in found),
            )
        self._named = self._named or bool(found)
        return found

    def _training_metrics(self, trainer: L.Trainer) -> dict[str, float]:
        steps = [_of_all_ranks(of_ranks) for of_ranks in zip(*all_gather_object(self._steps), strict=True)]
        stepped = [step for step in steps if step["stepped"]]
        metrics = {
            "train/optimizer_steps": float(trainer.global_step),
            "train/skipped_steps": float(sum(bool(step.get("skipped")) for step in steps)),
            "train/loss": _mean([step["mean_loss"] for step in stepped]),
            "train/grad_norm": _mean([step["grad_norm"] for step in stepped]),
            "train/learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
        }
        names = {"value_loss": "train/value_loss"}
        names |= {name: name for step in stepped for name in step if name.startswith("region/")}
        for name, shown in names.items():
            values = [step[name] for step in stepped if name in step]
            metrics |= {shown: _mean(values)} if values else {}
        metrics |= buffer_metrics(steps)
        metrics |= throughput_metrics(steps, all_gather_object(self._worker.state()))
        found = token_metrics([TokenSums.from_plain(of_rank) for of_rank in gather_object(self._tokens.to_plain())])
        data = rollouts_of(trainer)
        if data.sampling.temperature_spread or data.behave == "trainer":  # not the gap of engine and trainer
            found = {name: value for name, value in found.items() if not name.startswith("engine/")}
        return metrics | found

    def _seconds(self, data: EngineRollouts) -> dict[str, float]:
        seconds = data.clock.take()
        seconds["train"] = sum(step["train_seconds"] for step in self._steps)
        whole = time.perf_counter() - self._began - (data.start_seconds - self._start_before)
        inside = sum(value for name, value in seconds.items() if name != "start")
        seconds["other"] = whole - inside
        return {f"time/{name}": value for name, value in seconds.items()} | {"time/iteration": whole}

    def _check_gap(self, gap: float, exact: bool, floor: float | None = None) -> None:
        warning, error = self.limits.above_warning(exact, floor), self.limits.above_error(exact, floor)
        if error < math.inf and not gap <= error:  # nan counts as too large
            raise EngineGapError(
                f"engine and policy disagree by {gap:.3g} nats a token on average (monitor.gap_error is "
                f"{self.limits.error}, here {error:.3g}): the engine does not have the policy's weights, or samples "
                "from another distribution"
            )
        if not gap <= warning:
            log.warning(
                "engine and policy disagree by %.3g nats a token on average; above %.3g the behavior log-probs are "
                "not to be trusted: compare dtypes, and check that the weight sync covers every tensor",
                gap,
                warning,
            )

    def state_dict(self) -> dict[str, Any]:
        """This rank's steps of an interrupted iteration; `data.kept_by_ranks` saves and restores those of all ranks."""
        return {"steps": self._steps}

    def _own(self) -> dict[str, Any]:
        """What this rank collected in the iteration."""
        return {"steps": self._steps, "tokens": self._tokens.to_plain()}

    def _resume(self, saved: Sequence[dict[str, Any]], rank: int, ranks: int) -> None:
        """Restores what the ranks had collected. Each rank gets its own if the number of ranks is the same."""
        if saved:
            self._steps = saved[rank]["steps"] if len(saved) == ranks else _redistributed(saved, ranks)
        for of_rank in saved[rank::ranks]:
            self._tokens.merge(TokenSums.from_plain(of_rank["tokens"]))


def _redistributed(saved: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, float]]:
    """Steps of another number of ranks, divided among these so that sums over ranks stay the same."""
    steps = [_of_all_ranks(of_ranks) for of_ranks in zip(*(rank["steps"] for rank in saved), strict=True)]
    return [step | {name: step[name] / ranks for name in (*WORK, *SUMS) if name in step} for step in steps]


def _of_all_ranks(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Merges one step over ranks. Losses are averaged, since each rank scales its own by ranks / tokens of all ranks.
    Work is summed, the slowest rank gives the seconds, and the rest is equal on all ranks.
    """
    losses = {name: _mean([step[name] for step in steps]) for name in ("mean_loss", "value_loss") if name in steps[0]}
    work = {name: sum(step[name] for step in steps) for name in (*WORK, *SUMS) if name in steps[0]}
    return steps[0] | losses | work | {"train_seconds": max(step["train_seconds"] for step in steps)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
