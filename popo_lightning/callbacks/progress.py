"""One live line in a terminal, one plain line now and then in a log file."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.live import Live
from rich.table import Table

SHOWN = {
    "reward": ("reward/score", "{:.3f}"),
    "effective": ("rollout/effective_share", "{:.0%}"),
    "replayed": ("replay/share", "{:.0%}"),
    "entropy": ("policy/entropy", "{:.3f}"),
    "rollouts": ("total/responses", "{:,.0f}"),
}


class Progress(L.Callback):
    """Iteration, reward, effective share, replayed share, entropy, rollouts, time to go, and the last evaluation.

    Args:
        every_n_iterations: Iterations between lines where the output is no terminal.
    """

    def __init__(self, every_n_iterations: int = 10) -> None:
        self.every_n_iterations = every_n_iterations
        self.console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._evaluated: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Opens the live line."""
        self._began, self._first = time.perf_counter(), trainer.current_epoch
        if trainer.is_global_zero and self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        self._show_evaluation(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refreshes."""
        if not trainer.is_global_zero:
            return
        self._show_evaluation(trainer, pl_module)
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

    def _show_evaluation(self, trainer: L.Trainer, pl_module: Any) -> None:
        metrics = getattr(pl_module, "evaluation_metrics", {})
        if metrics is self._evaluated or not metrics or not trainer.is_global_zero:
            return
        self._evaluated = metrics
        values = {k.removeprefix("eval/"): v for k, v in metrics.items() if k.rsplit("/", 1)[-1].startswith(QUALITIES)}
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        iteration = trainer.datamodule.iteration  # type: ignore[attr-defined]
        self.console.print(f"evaluation after iteration {iteration}:  {text}", soft_wrap=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Closes the live line."""
        self._close()
        self._show_evaluation(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Closes the live line, so that the error stands below it."""
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The result of validate."""
        self._show_evaluation(trainer, pl_module)

    on_test_end = on_predict_end = on_validation_end


QUALITIES = ("greedy", "avg_at", "pass_at")


def _line(values: dict[str, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in values:
        table.add_column(name, no_wrap=True)
    table.add_row(*values.values())
    return table
