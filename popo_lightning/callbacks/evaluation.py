"""Evaluation on held-out problems: greedy accuracy, avg@k and unbiased pass@k."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from popo_lightning.errors import SettingError
from popo_lightning.groups import Group
from popo_lightning.metrics import AvgAtK, PassAtK
from popo_lightning.problems import Problem
from popo_lightning.rollout.engine import Sampling


class Evaluation(L.Callback):
    """Evaluates before training, every few iterations and at the end; also what validate, test and predict run.

    Its draws have seeds of their own, the same at every evaluation, and leave training's draws as they were.

    Args:
        every_n_iterations: Iterations between evaluations; 0 evaluates only before and after.
        at_start: Evaluate before training.
        samples: Responses per problem; 0 evaluates greedily only.
        avg_k: k of avg@k, at most samples.
        pass_k: k of pass@k, at most samples.
        greedy: Also take the most likely response of each problem.
        temperature: Sampling temperature.
        top_p: Nucleus mass kept.
        top_k: Tokens kept; 0 keeps all.
        max_new_tokens: Response limit in tokens; null takes that of training.
        seed: Decides the draws.
    """

    def __init__(
        self,
        every_n_iterations: int = 10,
        at_start: bool = True,
        samples: int = 8,
        avg_k: int = 4,
        pass_k: int = 8,
        greedy: bool = True,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if samples < 0 or every_n_iterations < 0:
            raise SettingError("evaluation.samples and evaluation.every_n_iterations cannot be negative")
        if samples and not (1 <= avg_k <= samples and 1 <= pass_k <= samples):
            raise SettingError(
                f"evaluation.avg_k is {avg_k} and evaluation.pass_k {pass_k}, but evaluation.samples only {samples}; "
                "use k from 1 to samples"
            )
        if not samples and not greedy:
            raise SettingError("evaluation.samples is 0 and evaluation.greedy false, which evaluates nothing")
        self.every_n_iterations = every_n_iterations
        self.at_start = at_start
        self.samples = samples
        self.avg_k = avg_k
        self.pass_k = pass_k
        self.greedy = greedy
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.history: list[dict[str, float]] = []  # one entry an evaluation, "iteration" among its keys

    # -- when --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Before training, unless resumed; then only where the checkpoint came between an iteration and its end."""
        data = self._data(trainer)
        if data.iteration == 0:
            if self.at_start and not self.history:
                self._evaluate_all(trainer, pl_module)
        elif not data.pending and not self._evaluated(data.iteration):
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Every n iterations."""
        iteration = self._data(trainer).iteration
        if self.every_n_iterations and iteration % self.every_n_iterations == 0:
            self._evaluate_all(trainer, pl_module)

    def _evaluated(self, iteration: int) -> bool:
        return bool(self.history) and self.history[-1]["iteration"] == iteration

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """At the end, unless that has just happened."""
        if not self._evaluated(self._data(trainer).iteration):
            self._evaluate_all(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """In validate and test, a batch is a benchmark."""
        name, problems = batch
        self._log(trainer, pl_module, self._evaluate(trainer, name, problems))

    on_test_batch_start = on_validation_batch_start

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """In predict, also writes every response to responses.jsonl."""
        name, problems = batch
        groups: list[Group] = []
        self._log(trainer, pl_module, self._evaluate(trainer, name, problems, groups))
        _write_responses(Path(trainer.default_root_dir) / "responses.jsonl", name, groups)

    # -- what --------------------------------------------------------------------------------------------------

    def _evaluate_all(self, trainer: L.Trainer, pl_module: Any) -> None:
        data = self._data(trainer)
        metrics: dict[str, float] = {}
        for name, problems in data.benchmarks():
            metrics |= self._evaluate(trainer, name, problems)
        self._log(trainer, pl_module, metrics)
        self.history.append({"iteration": data.iteration} | metrics)

    def _evaluate(
        self, trainer: L.Trainer, name: str, problems: Sequence[Problem], keep: list[Group] | None = None
    ) -> dict[str, float]:
        data = self._data(trainer)
        spent = data.clock.take()  # this generation is not training's
        data.sync()
        mine = problems[trainer.global_rank :: trainer.world_size]
        metrics: dict[str, float] = {}
        if self.greedy:
            groups = self._sample(trainer, mine, 1, 0.0)
            metrics[f"eval/{name}/greedy"] = _mean_over_ranks(trainer, _correct(groups)[:, 0])
        if self.samples:
            groups = self._sample(trainer, mine, self.samples, self.temperature)
            if keep is not None:
                keep += groups
            for label, metric in (
                (f"avg_at_{self.avg_k}", AvgAtK(self.avg_k)),
                (f"pass_at_{self.pass_k}", PassAtK(self.pass_k)),
            ):
                metric.to(trainer.strategy.root_device).update(_correct(groups).to(trainer.strategy.root_device))
                metrics[f"eval/{name}/{label}"] = float(metric.compute())
            lengths = [float(len(r.token_ids)) for g in groups for r in g.responses]
            cut = [float(r.finish_reason == "length") for g in groups for r in g.responses]
            metrics[f"eval/{name}/response_tokens"] = _mean_over_ranks(trainer, torch.tensor(lengths))
            metrics[f"eval/{name}/truncated_share"] = _mean_over_ranks(trainer, torch.tensor(cut))
        metrics[f"eval/{name}/seconds"] = sum(data.clock.take().values())
        data.clock.give_back(spent)
        return metrics

    def _sample(self, trainer: L.Trainer, problems: Sequence[Problem], n: int, temperature: float) -> list[Group]:
        data = self._data(trainer)
        limit = self.max_new_tokens or data.sampling.max_new_tokens
        sampling = Sampling(limit, temperature, self.top_p if temperature else 1.0, self.top_k if temperature else 0)
        seed = random.Random(f"evaluation/{self.seed}/{trainer.global_rank}").getrandbits(62)
        groups: list[Group] = data.sample(problems, n, sampling, seed)
        return groups

    def _log(self, trainer: L.Trainer, pl_module: Any, metrics: dict[str, float]) -> None:
        pl_module.evaluation_metrics = metrics
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._data(trainer).iteration)

    @staticmethod
    def _data(trainer: L.Trainer) -> Any:
        return trainer.datamodule  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The evaluations so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.history = state_dict["history"]


def _correct(groups: Sequence[Group]) -> Tensor:
    """(problems, n) accuracies."""
    return torch.stack([group.rewards("acc") for group in groups])


def _mean_over_ranks(trainer: L.Trainer, values: Tensor) -> float:
    """Mean over all ranks' values, however unevenly they are spread."""
    pair = torch.tensor([float(values.sum()), float(len(values))], dtype=torch.float64)
    total = trainer.strategy.reduce(pair.to(trainer.strategy.root_device), reduce_op="sum")
    assert isinstance(total, Tensor)
    return float(total[0] / total[1])


def _write_responses(path: Path, benchmark: str, groups: Sequence[Group]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for group in groups:
            for response in group.responses:
                row = {
                    "benchmark": benchmark,
                    "problem": group.problem.id,
                    "prompt": group.problem.prompt,
                    "response": response.text,
                    **response.parts,
                    "finish_reason": response.finish_reason,
                }
                file.write(json.dumps(row) + "\n")
