"""Tables of what the policy wrote: prompt, response, reward, advantage, age."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from popo_lightning.errors import SettingError
from popo_lightning.minibatch import Minibatch

COLUMNS = ("iteration", "problem", "prompt", "response", "score", "advantage", "age", "finish_reason")
SHOWN_CHARACTERS = 2000


class SampleTable(L.Callback):
    """Keeps a few whole groups of the first minibatch, as lines of samples.jsonl and as a TensorBoard text.

    Args:
        every_n_iterations: Iterations between tables; 0 keeps none.
        groups: Groups shown, replayed ones first among them if there are any.
    """

    def __init__(self, every_n_iterations: int = 20, groups: int = 4) -> None:
        if groups < 1 or every_n_iterations < 0:
            raise SettingError(
                f"samples.groups is {groups} and samples.every_n_iterations {every_n_iterations}; show at least 1 "
                "group, and set samples.every_n_iterations to 0 for no tables"
            )
        self.every_n_iterations = every_n_iterations
        self.groups = groups

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Writes the table of the first minibatch."""
        assert isinstance(batch, Minibatch)
        due = self.every_n_iterations and batch.version % self.every_n_iterations == 0
        if not due or batch.index != 0 or not trainer.is_global_zero or not batch.groups:
            return
        rows = self._rows(batch, pl_module.advantages(batch))
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", markdown_table(rows), batch.version + 1)

    def _rows(self, batch: Minibatch, advantages: list[float]) -> list[dict[str, Any]]:
        remaining = iter(advantages)
        per_group = [[next(remaining) for _ in group.responses] for group in batch.groups]
        order = sorted(range(len(batch.groups)), key=lambda i: batch.fresh[i])
        half = max(1, self.groups // 2)
        chosen = order[:half] + order[::-1][: self.groups - half]  # replayed first, then fresh
        rows = []
        for place in dict.fromkeys(chosen):
            group = batch.groups[place]
            for response, advantage in zip(group.responses, per_group[place], strict=True):
                values = (
                    batch.version + 1,
                    group.problem.id,
                    str(group.problem.prompt)[:SHOWN_CHARACTERS],
                    response.text[:SHOWN_CHARACTERS],
                    response.parts["score"],
                    round(advantage, 3),
                    batch.version - group.version,
                    response.finish_reason,
                )
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table in which hostile text cannot break out of its cell."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        texts = (str(row[column]).replace("\r", "\n") for column in COLUMNS)  # Markdown ends a line at either
        cells = (text.replace("`", "'").replace("|", "\\|").replace("\n", " ⏎ ") for text in texts)
        lines.append("| " + " | ".join(f"`{cell}`" if cell else "" for cell in cells) + " |")
    return "\n".join(lines)
