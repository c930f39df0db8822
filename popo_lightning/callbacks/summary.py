"""summary.json: the outcome of a run in one small file that other tools read."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from popo_lightning.core.trainer_callbacks import callback_of
from popo_lightning.core.whole_files import replaced
from popo_lightning.evaluation.benchmarks import MEAN
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.evaluation.results import by_benchmark
from popo_lightning.model.policy_model import policy_of
from popo_lightning.rollout.engine_rollouts import rollouts_of
from popo_lightning.runs.record import RunRecord
from popo_lightning.runs.stopping import stop_requests


@dataclass(eq=False)
class Summary(L.Callback):
    """Writes summary.json into the run's folder at the end.

    Args:
        record: Identity of the run.
    """

    record: RunRecord

    def __post_init__(self) -> None:
        self.begin_anew()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the iteration's seconds by phase."""
        for name, value in policy_of(pl_module).iteration_metrics.items():
            kind, _, phase = name.partition("/")
            if kind == "time":
                self._phases[phase] = self._phases.get(phase, 0) + value

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file unless the run was asked to stop; a resumed run then repeats the last evaluation."""
        stop_requests(trainer).check(trainer)
        if trainer.is_global_zero:
            with replaced(Path(trainer.default_root_dir) / "summary.json") as file:
                file.write(json.dumps(self._content(trainer), indent=2) + "\n")

    def _content(self, trainer: L.Trainer) -> dict[str, Any]:
        data = rollouts_of(trainer)
        totals = data.totals
        evaluation = callback_of(trainer, Evaluation)
        history = evaluation.history if evaluation else []
        origin = self.record.origin
        first = origin["iterations"] + 1 if origin else 0  # earlier evaluations are another run's
        own = [entry for entry in history if entry["iteration"] >= first]
        evaluation_seconds = sum(v for entry in own for k, v in entry.items() if k.endswith("/seconds"))
        needed = totals.dynamic_sampling_responses
        return {
            "method": self.record.method,
            "task": self.record.task,
            "seed": self.record.seed,
            "began_from": origin,
            "iterations": data.iteration,
            "optimizer_steps": trainer.global_step,
            "responses": totals.responses,
            "response_tokens": totals.tokens,
            "dynamic_sampling_responses": None if math.isinf(needed) else round(needed),
            "wall_seconds": round(self._seconds(), 3),
            "seconds": {k: round(v, 3) for k, v in self._phases.items()} | {"evaluation": round(evaluation_seconds, 3)},
            "effective_share": totals.effective_groups / max(1, totals.groups),
            "replay_share": totals.replayed_groups / max(1, totals.trained_groups),
            "first_evaluation": flatten_evaluation(first) if (first := first_of(history)) else None,
            "last_evaluation": flatten_evaluation(history[-1]) if history else None,
            "evaluations": history,
        }

    def begin_anew(self) -> None:
        """Sets the seconds to 0; those of a checkpoint may be another run's."""
        self._earlier_seconds = 0.0
        self._phases: dict[str, float] = {}

    def _seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._began

    def state_dict(self) -> dict[str, Any]:
        """Seconds so far."""
        return {"seconds": self._seconds(), "phases": self._phases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the seconds so far."""
        self._earlier_seconds = state_dict["seconds"]
        self._phases = state_dict["phases"]


def first_of(history: list[dict[str, float]]) -> dict[str, float] | None:
    """The evaluation before training, else the earliest of several; None if the only one is at the end."""
    return history[0] if history and (len(history) > 1 or history[0]["iteration"] == 0) else None


def flatten_evaluation(entry: dict[str, float]) -> dict[str, float | None]:
    """Means of an evaluation over the benchmarks under fixed names, with their k.

    If a benchmark has several k of pass@k, the largest counts. A k that differs between benchmarks is null.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for benchmark, numbers in by_benchmark(entry).items():
        if benchmark == MEAN:
            continue
        for kind in ("greedy", "avg", "pass"):
            values = [
                (int(label.rpartition("_")[2]) if "_at_" in label else 0, value)
                for label, value in numbers.items()
                if label == kind or label.startswith(f"{kind}_at_")
            ]
            if values:
                found.setdefault(kind, []).append(max(values))
    result: dict[str, float | None] = {"iteration": entry["iteration"]}
    for kind in ("avg", "pass"):
        ks = {k for k, _ in found.get(kind, [])}
        result[f"{kind}_k"] = ks.pop() if len(ks) == 1 else None
    names = {"greedy": "greedy", "avg": "avg_at_k", "pass": "pass_at_k"}
    means = {kind: sum(v for _, v in values) / len(values) for kind, values in found.items()}
    return result | {name: means.get(kind) for kind, name in names.items()}  # null if it was not evaluated
