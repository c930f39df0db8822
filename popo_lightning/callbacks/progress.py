"""One live line in a terminal, one plain line every few iterations in a log file."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.live import Live
from rich.table import Table

from popo_lightning.callbacks.export_words import export_words
from popo_lightning.core.trainer_callbacks import callback_of
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.evaluation.results import EvaluationResult
from popo_lightning.evaluation.tables import benchmark_sheet, breakdown_sheet, change_sheet

SHOWN = {
    "reward": ("reward/score", "{:.3f}"),
    "effective": ("rollout/effective_share", "{:.0%}"),
    "replayed": ("replay/share", "{:.0%}"),
    "entropy": ("policy/entropy", "{:.3f}"),
    "rollouts": ("total/responses", "{:,.0f}"),
}


class Progress(L.Callback):
    """Prints iteration, reward, shares, entropy, rollouts and remaining time, and the tables of evaluations.

    Args:
        every_n_iterations: Iterations between lines if the output is not a terminal.
    """

    def __init__(self, every_n_iterations: int = 10) -> None:
        self.every_n_iterations = every_n_iterations
        self.console = Console(stderr=True, highlight=False)
        if not self.console.is_terminal:
            self.console.width = 160  # a log file has no edge to fold tables at
        self._live: Live | None = None
        self._shown: EvaluationResult | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Says what the first seconds, or a minute, are spent on."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and stage == "fit":
            work = f"loading the policy, starting {type(data.engine).__name__}"
            self.console.print(f"{trainer.default_root_dir}: {work}", soft_wrap=True, markup=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Opens the live line."""
        self._began, self._first = time.perf_counter(), trainer.current_epoch
        if trainer.is_global_zero and self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        self._show_evaluation(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refreshes."""
        if not trainer.is_global_zero:
            return
        self._show_evaluation(trainer)
        done = trainer.current_epoch + 1
        values = self._values(pl_module.iteration_metrics, done, trainer.max_epochs or -1)
        if self._live is not None:
            self._live.update(_line(values))
        elif done % self.every_n_iterations == 0 or done == trainer.max_epochs:
            self.console.print("  ".join(f"{name} {value}" for name, value in values.items()), soft_wrap=True)

    def _values(self, metrics: dict[str, float], done: int, whole: int) -> dict[str, str]:
        shown = {"iteration": f"{done}/{whole}" if whole > 0 else str(done)}
        shown |= {name: form.format(metrics[key]) for name, (key, form) in SHOWN.items() if key in metrics}
        if whole > 0:
            a_piece = (time.perf_counter() - self._began) / max(1, done - self._first)
            left = int(a_piece * (whole - done))
            shown["left"] = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return shown

    def _show_evaluation(self, trainer: L.Trainer) -> None:
        """A table of the newest evaluation, unless that has been shown."""
        evaluation = callback_of(trainer, Evaluation)
        result = evaluation.latest if evaluation else None
        if result is None or result is self._shown or not result.benchmarks or not trainer.is_global_zero:
            return
        self._shown = result
        title = f"evaluation after iteration {result.iteration}"
        if trainer.state.fn != "fit" and trainer.ckpt_path is not None:
            title += f", {Path(str(trainer.ckpt_path)).name}"
        self.console.print(benchmark_sheet(result, title).for_terminal(), "", crop=False)

    def _show_end(self, trainer: L.Trainer) -> None:
        """What is worth reading once, at the end: the newest evaluation's parts, and where everything is."""
        evaluation = callback_of(trainer, Evaluation)
        if evaluation is None or evaluation.latest is None or not trainer.is_global_zero:
            return
        by_part = breakdown_sheet(evaluation.latest)
        if by_part is not None:
            self.console.print(by_part.for_terminal(), "", crop=False)
        if trainer.state.fn == "fit" and len(evaluation.history) > 1 and evaluation.latest.benchmarks:
            self.console.print(
                change_sheet(evaluation.history[0], evaluation.history[-1]).for_terminal(), "", crop=False
            )
        if evaluation.written is not None:
            self.console.print(f"evaluation written to {evaluation.written}", soft_wrap=True, markup=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Closes the live line; the last evaluation with its parts, and the first beside it."""
        self._close()
        self._show_evaluation(trainer)
        self._show_end(trainer)
        if trainer.is_global_zero and (words := export_words(trainer)) is not None:
            self.console.print(words, soft_wrap=True, markup=False)
            run = shlex.quote(trainer.default_root_dir)
            self.console.print(
                f"look at the run by: popo show {run}   or: tensorboard --logdir {run}", soft_wrap=True, markup=False
            )

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Closes the live line, so that the error stands below it."""
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The result of validate, with its parts and where it is written."""
        self._show_evaluation(trainer)
        self._show_end(trainer)

    on_test_end = on_predict_end = on_validation_end


def _line(values: dict[str, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in values:
        table.add_column(name, no_wrap=True)
    table.add_row(*values.values())
    return table
