"""Tables of what the policy wrote: prompt, response, reward, advantage and age."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from popo_lightning.callbacks.checkpoint_writing import words
from popo_lightning.callbacks.sample_texts import sample_text
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.core.whole_files import replaced
from popo_lightning.evaluation.files import to_json
from popo_lightning.model.policy_model import policy_of
from popo_lightning.model.prompts import open_image
from popo_lightning.rollout.engine_rollouts import rollouts_of

SAMPLES = "samples.jsonl"
SHOWN_CHARACTERS = 2000
IMAGES = "samples_images"  # folder inside the run's, for images that problems hold as bytes


class SampleTable(L.Callback):
    """Writes a few whole groups of the first minibatch to samples.jsonl and to TensorBoard as text.

    If the iteration trains on no group because none is effective, it shows the sampled groups without advantages.

    Args:
        every_n_iterations: Iterations between tables; 0 writes none.
        groups: Number of groups shown. Half of them are replayed ones if there are any, listed first.
    """

    def __init__(self, every_n_iterations: int = 20, groups: int = 4) -> None:
        if groups < 1 or every_n_iterations < 0:
            raise SettingError(
                f"samples.groups is {groups} and samples.every_n_iterations {every_n_iterations}; show at least 1 "
                "group, and set samples.every_n_iterations to 0 for no tables"
            )
        self.every_n_iterations = every_n_iterations
        self.groups = groups

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drops what a run wrote after the checkpoint that it resumes from.

        Raises:
            SettingError: The disk does not take what is left; the file stays as it is.
        """
        file = Path(trainer.default_root_dir) / SAMPLES
        if not trainer.is_global_zero or not file.exists():
            return
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _iteration(line) <= rollouts_of(trainer).iteration]
        if len(kept) == len(lines):
            return
        try:
            with replaced(file) as draft:
                draft.writelines(kept)
        except OSError as error:
            raise SettingError(
                f"run.folder is '{trainer.default_root_dir}', where {SAMPLES} cannot be written ({words(error)}); make "
                "room, or name another folder"
            ) from error

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Writes the table of the first minibatch, whose proximal log-probs and critic's values are now recorded."""
        assert isinstance(batch, Minibatch)
        due = self.every_n_iterations and batch.version % self.every_n_iterations == 0
        if not due or batch.index != 0 or not trainer.is_global_zero:
            return
        advantages = batch.charged(policy_of(pl_module).advantages(batch)) if batch.groups else None
        if advantages is None:
            report = rollouts_of(trainer).report
            batch = Minibatch(report.fresh if report else [], batch.version, batch.index)
        chosen = self._chosen(batch)
        rows = self._rows(batch, chosen, advantages)
        if not rows:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / SAMPLES).open("a") as file:
            file.writelines(to_json(row) + "\n" for row in rows)
        groups = [batch.groups[place] for place in chosen]
        for group in groups:
            save_images(folder, group.problem)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                tags = _show_images(logger, groups, batch.version + 1)
                logger.experiment.add_text("samples", sample_text(rows, tags), batch.version + 1)

    def _chosen(self, batch: Minibatch) -> list[int]:
        """Indices of the groups to show: replayed groups first, then fresh ones."""
        order = sorted(range(len(batch.groups)), key=lambda i: batch.fresh[i])
        half = max(1, self.groups // 2)
        return list(dict.fromkeys(order[:half] + order[::-1][: self.groups - half]))

    def _rows(self, batch: Minibatch, chosen: list[int], advantages: list[Tensor] | None) -> list[dict[str, Any]]:
        """Rows of the table. advantages has one entry per response of the batch; None if nothing is trained on."""
        remaining = iter([] if advantages is None else advantages)
        per_group = [[next(remaining, None) for _ in group.responses] for group in batch.groups]
        return [row for place in chosen for row in group_rows(batch.groups[place], per_group[place], batch.version)]


def group_rows(group: Group, advantages: Sequence[Tensor | None], version: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each response of a group. Long texts are cut.

    Args:
        group: Graded group.
        advantages: One per response, with one number or one per token; rows show the mean. None if nothing is trained.
        version: Policy version of the iteration.
    """
    problem = group.problem
    images = {"images": [_name(image) for image in problem.images]} if problem.images else {}
    for response, advantage in zip(group.responses, advantages, strict=True):
        yield (
            {
                "iteration": version + 1,
                "group": group.id,
                "problem": problem.id,
                "prompt": _cut(problem.prompt),
                "answer": problem.answer,
                "response": response.text[:SHOWN_CHARACTERS],
                "score": response.parts["score"],
                "parts": response.parts,
                "failure": response.failure,
                "advantage": None if advantage is None else round(float(advantage.float().mean()), 3),
                "age": version - group.version_of(response),
                "fresh": group.version == version,
                "finish_reason": response.finish_reason,
                "tokens": len(response.token_ids),
            }
            | ({} if response.temperature is None else {"temperature": round(response.temperature, 3)})
            | images
        )


def save_images(folder: Path, problem: Problem) -> None:
    """Writes the images that a problem holds as bytes, under the names that its rows give them."""
    for image in problem.images:
        if isinstance(image, bytes):
            path = folder / _name(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)


def _name(image: str | bytes) -> str:
    """Path of an image. For bytes it is relative to the run's folder."""
    return image if isinstance(image, str) else f"{IMAGES}/{hashlib.sha256(image).hexdigest()[:24]}"


def _cut(prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Cuts a prompt, or each of its messages, to SHOWN_CHARACTERS."""
    if isinstance(prompt, str):
        return prompt[:SHOWN_CHARACTERS]
    return [
        {**message, "content": content[:SHOWN_CHARACTERS]}
        if isinstance(content := message.get("content"), str)
        else message
        for message in prompt
    ]


def _show_images(logger: TensorBoardLogger, groups: Sequence[Group], step: int) -> dict[int, list[str]]:
    """Shows the images of the groups, in their order and under their step.

    Returns:
        Tags by the group's id.
    """
    tags: dict[int, list[str]] = {}
    for group in groups:
        for image in group.problem.images:
            with suppress(OSError):  # a replayed problem's file may be gone; its tensors are in the group
                pixels = torch.from_numpy(np.array(open_image(image)))
                tag = f"samples/image {sum(map(len, tags.values())) + 1}"
                logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
                tags.setdefault(group.id, []).append(tag)
    return tags


def _iteration(line: str) -> float:
    """Iteration of a line of the file; infinite for a line that a killed process left half-written."""
    try:
        return float(json.loads(line)["iteration"])
    except ValueError:
        return math.inf
