"""Evaluation on held-out problems: when it happens, what it samples, and where its results are written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.core.problems import Problem
from popo_lightning.core.whole_files import replaced
from popo_lightning.evaluation.benchmarks import (
    DEFAULT_BREAKDOWN,
    BenchmarkSettings,
    EvalSettings,
    a_part,
    check_names,
    checked_number_kept,
    metric_names,
    seed_of_draws,
    several,
)
from popo_lightning.evaluation.files import rank_file, sample_rows, write_json, write_rows
from popo_lightning.evaluation.results import BenchmarkResult, EvaluationResult, check_graded, measured
from popo_lightning.evaluation.tables import benchmark_table, breakdown_table
from popo_lightning.metrics.monitors import check_evaluation_monitors, consult, settle_stopping
from popo_lightning.rollout.engine_rollouts import rollouts_of
from popo_lightning.runs.folder import EVALUATIONS, RESULTS
from popo_lightning.runs.stopping import stop_requests


class Evaluation(KeepsState, L.Callback):
    """Evaluates before training, every few iterations and at the end; validate, test and predict run it too.

    Its draws leave training's random states unchanged. Results and responses are written to the folder evaluations.

    Args:
        every_n_iterations: Iterations between evaluations; 0 evaluates only before and after training.
        at_start: Evaluate before training.
        samples: Sampled responses per problem; 0 evaluates greedily only.
        avg_k: k of avg@k, at most samples.
        pass_k: k of pass@k, one value or several such as [1, 8], each at most samples.
        greedy: Also generate the greedy response of each problem.
        temperature: Sampling temperature.
        top_p: Nucleus sampling probability mass.
        top_k: Number of most likely tokens to sample from; 0 means all.
        max_new_tokens: Response limit in tokens; null uses training's limit.
        limit: Maximum number of problems per benchmark, a fixed random subset; 0 means all.
        benchmarks: The settings from samples to limit, overridden for single benchmarks by name.
        breakdown: Fields of a problem's info by which results are broken down, in tables and in results.json.
        write_samples: Write every response of every evaluation, one file per benchmark.
        keep_responses: Problems per benchmark whose responses are written for popo estimate, 25 bytes a token.
        seed: Seed of the evaluation's draws.
        new_draws: Draw anew at every evaluation, so that two of a run are independent; false repeats the seeds.
    """

    state = ("history",)

    def __init__(
        self,
        every_n_iterations: int = 10,
        at_start: bool = True,
        samples: int = 8,
        avg_k: int = 4,
        pass_k: int | list[int] = 8,
        greedy: bool = True,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int | None = None,
        limit: int = 0,
        benchmarks: dict[str, BenchmarkSettings] | None = None,
        breakdown: Sequence[str] = DEFAULT_BREAKDOWN,
        write_samples: bool = True,
        keep_responses: int = 0,
        seed: int = 0,
        new_draws: bool = False,
    ) -> None:
        at_least("evaluation.every_n_iterations", every_n_iterations, 0, ", which evaluates only before and after")
        ks = several(pass_k)
        self.settings = EvalSettings(samples, avg_k, ks, greedy, temperature, top_p, top_k, max_new_tokens, limit)
        self.settings.check("evaluation")
        self.benchmarks = benchmarks or {}
        for name in self.benchmarks:
            self.settings_of(name).check(f"evaluation.benchmarks.{name}")
        self.every_n_iterations = every_n_iterations
        self.at_start = at_start
        self.breakdown = tuple(dict.fromkeys(breakdown))
        self.write_samples = write_samples
        self.keep_responses = checked_number_kept(keep_responses, write_samples)
        self.seed = seed
        self.new_draws = new_draws
        self.history: list[dict[str, float]] = []  # one entry per evaluation, with "iteration" among its keys
        self.latest: EvaluationResult | None = None  # the latest of this process
        self.written: Path | None = None  # its folder, or the file of predict
        self._results: list[BenchmarkResult] = []  # results of the present validate, test or predict
        self._responses: IO[str] | None = None  # file of predict
        self._writing = ExitStack()  # holds it

    def settings_of(self, benchmark: str) -> EvalSettings:
        """Settings with which a benchmark is evaluated."""
        own = self.benchmarks.get(benchmark)
        return self.settings if own is None else self.settings.changed(own)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses settings for benchmarks that the task does not have, before a model loads."""
        data = rollouts_of(trainer)
        found = dict(data.benchmarks())
        check_names(found, self.benchmarks, self.breakdown)
        for name, problems in found.items():
            settings = self.settings_of(name)
            if len(settings.chosen(problems)) < trainer.world_size:
                raise SettingError(
                    f"evaluation.limit of benchmark '{name}' is {settings.limit}, fewer problems than there are ranks "
                    f"({trainer.world_size}); raise it"
                )
        if stage == "fit":
            names = metric_names({name: self.settings_of(name) for name in found})
            check_evaluation_monitors(trainer, names, self.every_n_iterations)
            settle_stopping(trainer)
        # an engine must make room for the longest response before it starts
        data.longest_response = max((self.settings_of(name).max_new_tokens or 0 for name in found), default=0)

    # -- when --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates before training; when resumed, only if the checkpoint lacks its iteration's evaluation."""
        data = rollouts_of(trainer)
        if data.iteration == 0:
            if self.at_start and not self.history:
                self._evaluate_all(trainer)
        elif not data.pending and not self._evaluated(data.iteration):
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates every n iterations."""
        iteration = rollouts_of(trainer).iteration
        if self.every_n_iterations and iteration % self.every_n_iterations == 0:
            self._evaluate_all(trainer)

    def _evaluated(self, iteration: int) -> bool:
        return bool(self.history) and self.history[-1]["iteration"] == iteration

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates at the end, unless this iteration has been evaluated."""
        if not self._evaluated(rollouts_of(trainer).iteration):
            self._evaluate_all(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drops the results of an earlier validate."""
        self._results = []

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluates a benchmark: in validate and test, each batch is one."""
        name, problems = batch
        self._results.append(self._evaluate(trainer, name, problems, self._folder(trainer)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs and writes the results of validate or test."""
        if self._results:
            self._finish(trainer, self._results, self._folder(trainer))

    on_test_start, on_test_batch_start, on_test_end = on_validation_start, on_validation_batch_start, on_validation_end

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens responses.jsonl for all responses."""
        self._results = []
        self.written = rank_file(Path(trainer.default_root_dir), "responses", trainer.global_rank, trainer.world_size)
        self._responses = self._writing.enter_context(replaced(self.written))

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluates like validate, but keeps only the sampled responses, or the greedy ones if none is sampled."""
        name, problems = batch
        self._results.append(self._evaluate(trainer, name, problems, None))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts responses.jsonl in its place, and logs the results."""
        self._writing.close()
        self._responses = None
        if self._results:
            self._finish(trainer, self._results, None)
        for result in self._results:  # only now, since the responses are worth keeping
            check_graded(result, rollouts_of(trainer).generator.pool)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keeps the responses.jsonl of an earlier predict."""
        if self._responses is not None:
            self._writing.__exit__(type(exception), exception, exception.__traceback__)
            self._responses = None

    # -- what --------------------------------------------------------------------------------------------------

    def _evaluate_all(self, trainer: L.Trainer) -> None:
        data, folder = rollouts_of(trainer), self._folder(trainer)
        self._finish(trainer, [self._evaluate(trainer, name, them, folder) for name, them in data.benchmarks()], folder)
        assert self.latest is not None
        self.history.append({"iteration": data.iteration} | self.latest.metrics())
        if data.iteration:  # the first policy's numbers show neither progress nor a lack of it
            consult(trainer, trainer.lightning_module, self.latest.metrics())

    def _evaluate(
        self, trainer: L.Trainer, name: str, problems: Sequence[Problem], folder: Path | None
    ) -> BenchmarkResult:
        data = rollouts_of(trainer)
        settings = self.settings_of(name)
        settings = replace(settings, max_new_tokens=settings.max_new_tokens or data.sampling.max_new_tokens)
        stop_requests(trainer).check(trainer)
        data.ahead.join()
        spent = data.clock.take()  # training does not count this generation
        problems = settings.chosen(problems)
        mine = problems[trainer.global_rank :: trainer.world_size]
        with stop_requests(trainer).interruptible(trainer.world_size == 1):
            data.sync()
            greedy = self._sample(trainer, name, mine, 1, replace(settings, temperature=0.0)) if settings.greedy else []
            sampled = self._sample(trainer, name, mine, settings.samples, settings) if settings.samples else []
        seconds = sum(data.clock.take().values())
        data.clock.give_back(spent)
        stop_requests(trainer).check(trainer)  # there may be no next benchmark that checks
        if folder is not None and self.write_samples:
            kept = {problem.id for problem in a_part(problems, self.keep_responses)}
            with replaced(rank_file(folder, name, trainer.global_rank, trainer.world_size)) as file:
                write_rows(file, sample_rows(name, greedy, sampled, self.breakdown, kept))
        if self._responses is not None:
            write_rows(self._responses, sample_rows(name, [] if sampled else greedy, sampled, self.breakdown))
        result = measured(trainer, name, settings, problems, greedy, sampled, self.breakdown, seconds)
        if self._responses is None and not (trainer.state.fn == "fit" and data.iteration):
            check_graded(result, data.generator.pool)
        return result

    def _sample(
        self, trainer: L.Trainer, name: str, problems: Sequence[Problem], n: int, settings: EvalSettings
    ) -> list[Group]:
        data = rollouts_of(trainer)
        assert settings.max_new_tokens is not None
        sampling = replace(
            data.sampling,  # for its stop strings
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p if settings.temperature else 1.0,
            top_k=settings.top_k if settings.temperature else 0,
            temperature_spread=0.0,
        )
        seed = seed_of_draws(self.seed, trainer.global_rank, name, data.iteration if self.new_draws else None)
        how = f"{n} sampled each" if settings.temperature else "greedy"
        with data.generator.work.named(f"evaluating {name} ({how})"):
            return data.sample(problems, n, sampling, seed)

    def _finish(self, trainer: L.Trainer, results: list[BenchmarkResult], folder: Path | None) -> None:
        """Logs and writes results; Progress shows ``latest``."""
        iteration = rollouts_of(trainer).iteration
        self.latest = EvaluationResult(iteration, results)
        metrics = self.latest.metrics()
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=iteration)
            if isinstance(logger, TensorBoardLogger) and results and trainer.is_global_zero:
                tables = {"evaluation": benchmark_table(self.latest, ""), "breakdown": breakdown_table(self.latest)}
                for tag, table in tables.items():
                    if table is not None:
                        logger.experiment.add_text(tag, table.markdown(), iteration)
        if folder is not None and results and trainer.is_global_zero:
            write_json(folder / RESULTS, self._origin(trainer) | self.latest.to_plain())
            self.written = folder

    def _origin(self, trainer: L.Trainer) -> dict[str, Any]:
        """What the numbers depend on, besides the settings written next to them."""
        fitting = trainer.state.fn == "fit"
        return {
            "model": str(trainer.lightning_module.folder),
            "checkpoint": None if fitting or trainer.ckpt_path is None else str(trainer.ckpt_path),
            "seed": self.seed,
            "new_draws": self.new_draws,
            "ranks": trainer.world_size,
        }

    def _folder(self, trainer: L.Trainer) -> Path:
        """Folder of an evaluation: one per iteration during training, one per command for validate and test."""
        assert trainer.state.fn is not None
        fitting = trainer.state.fn == "fit"
        name = f"iteration-{rollouts_of(trainer).iteration:06d}" if fitting else trainer.state.fn.value
        return Path(trainer.default_root_dir) / EVALUATIONS / name

    def keep_present(self, iteration: int) -> None:
        """Drops another run's evaluations, except that of the weights that this run begins with."""
        self.history = [entry for entry in self.history if entry["iteration"] == iteration]
