"""A bar in a terminal, one plain line every few iterations in a log file, and the block that ends a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console, RenderableType
from rich.live import Live

from popo_lightning.callbacks.closing_block import closing_block
from popo_lightning.callbacks.progress_lines import Course, bar, hours
from popo_lightning.core.trainer_callbacks import callback_of
from popo_lightning.core.work import Work
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.evaluation.results import EvaluationResult
from popo_lightning.evaluation.tables import benchmark_table, breakdown_table, change_table
from popo_lightning.model.policy_model import policy_of
from popo_lightning.rollout.engine_rollouts import rollouts_of

SHOWN = {
    "reward": ("reward/score", "{:.3f}"),
    "effective": ("rollout/effective_share", "{:.0%}"),
    "replayed": ("replay/share", "{:.0%}"),
    "entropy": ("policy/entropy", "{:.3f}"),
    "rollouts": ("total/responses", "{:,.0f}"),
}
BETWEEN = 30.0  # seconds between two lines of a log about one piece of work
SAMPLING = "sampling"


class Progress(L.Callback):
    """Prints what a run is doing, iterations, times, reward, shares, entropy and rollouts, and tables of evaluations.

    In a terminal, a bar shows iterations, elapsed time, seconds per iteration, the time left and the present work. The
    end of a run prints where everything is, and the commands that look at the run, export it and train it further.

    Args:
        every_n_iterations: Iterations between lines if the output is not a terminal.
    """

    def __init__(self, every_n_iterations: int = 10) -> None:
        self.every_n_iterations = every_n_iterations
        self.console = Console(stderr=True, highlight=False)
        if not self.console.is_terminal:
            self.console.width = 160  # a log file is not as narrow as a terminal
        self._live: Live | None = None
        self._shown: EvaluationResult | None = None
        self._course: Course | None = None
        self._work = Work()
        self._values: dict[str, str] = {}
        self._began = self._said = time.perf_counter()
        self._ended = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Shows what the first seconds, or a minute, are spent on."""
        if not trainer.is_global_zero:
            return
        data = rollouts_of(trainer)
        self._began, self._ended, self._course = time.perf_counter(), False, None
        self._work = data.generator.work
        self._work.changed = self._on_work
        self._work.what = f"loading the policy, starting {type(data.engine).__name__}"
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self._bar, transient=True)
            self._live.start()
        else:
            self._print(self._work.what)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the first evaluation; everything is loaded by now."""
        self._work.what = SAMPLING
        self._course = Course(max(0, trainer.max_epochs or 0), trainer.current_epoch)
        self._show_evaluation(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Shows that the policy trains."""
        self._work.what, self._work.whole = "training", 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows that the next responses are sampled."""
        self._work.what, self._work.whole = SAMPLING, 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Updates the bar, or prints a line every few iterations."""
        if not trainer.is_global_zero or self._course is None:
            return
        self._show_evaluation(trainer)
        done, metrics = trainer.current_epoch + 1, policy_of(pl_module).iteration_metrics
        self._course.advance(done)
        self._values = {name: form.format(metrics[key]) for name, (key, form) in SHOWN.items() if key in metrics}
        if self._live is None and (done % self.every_n_iterations == 0 or done == trainer.max_epochs):
            numbers = self._course.values() | self._values
            self._print("  ".join(f"{name} {value}" for name, value in numbers.items()))

    def _bar(self) -> RenderableType:
        return bar(self._course, str(self._work), self._values, self._began)

    def _on_work(self) -> None:
        """Prints a line in a log about work that takes long."""
        now = time.perf_counter()
        if self._live is None and now - self._said > BETWEEN and self._work.whole:
            self._print(f"{hours(now - self._began)}  {self._work}")

    def _print(self, line: str) -> None:
        self._said = time.perf_counter()
        self.console.print(line, soft_wrap=True, markup=False)

    def _show_evaluation(self, trainer: L.Trainer) -> None:
        """Prints a table of the newest evaluation unless it has been shown."""
        evaluation = callback_of(trainer, Evaluation)
        result = evaluation.latest if evaluation else None
        if result is None or result is self._shown or not result.benchmarks or not trainer.is_global_zero:
            return
        self._shown = result
        title = f"evaluation after iteration {result.iteration}"
        if trainer.state.fn != "fit" and trainer.ckpt_path is not None:
            title += f", {Path(str(trainer.ckpt_path)).name}"
        self.console.print(benchmark_table(result, title).for_terminal(), "", crop=False)

    def _show_end(self, trainer: L.Trainer) -> None:
        """Closes the bar; prints the newest evaluation, also by part, the change since the first, and its files."""
        self._close()
        self._show_evaluation(trainer)
        evaluation = callback_of(trainer, Evaluation)
        if evaluation is None or evaluation.latest is None or not trainer.is_global_zero:
            return
        by_part = breakdown_table(evaluation.latest)
        if by_part is not None:
            self.console.print(by_part.for_terminal(), "", crop=False)
        if trainer.state.fn == "fit" and len(evaluation.history) > 1 and evaluation.latest.benchmarks:
            self.console.print(
                change_table(evaluation.history[0], evaluation.history[-1]).for_terminal(), "", crop=False
            )
        if evaluation.written is not None:
            self._print(f"evaluation written to {evaluation.written}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the last evaluation, also by part and compared with the first."""
        self._show_end(trainer)
        self._ended = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prints where everything is and the commands that continue from there, once all is saved."""
        self._close()
        if stage == "fit" and self._ended and trainer.is_global_zero:
            block = closing_block(trainer)
            width = max(map(len, block))
            for name, value in block.items():
                self._print(f"{name:<{width}}  {value}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error is printed below it."""
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the result of validate, also by part, and the path that it is written to."""
        self._show_end(trainer)

    on_test_end = on_predict_end = on_validation_end
