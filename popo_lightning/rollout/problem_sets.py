"""The problems of a task that a run can ask: those with prompts short enough and images that decode."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.model.prompts import PromptEncoder

Benchmark = tuple[str, Sequence[Problem]]
BAD_ROWS = "bad_rows.jsonl"


class ProblemSets:
    """Train and held-out problems, each read and checked once.

    Args:
        task: Source of the problems.
        prompts: Measures the length of a prompt.
        world_size: Number of ranks that share them.
        folder: Folder for the list of rows that the task left out; None on all ranks but the first.
    """

    def __init__(self, task: Task, prompts: PromptEncoder, world_size: int, folder: Path | None) -> None:
        self.task = task
        self.prompts = prompts
        self.world_size = world_size
        self.folder = folder

    @cached_property
    def train(self) -> list[Problem]:
        """Problems to sample from."""
        problems = self.prompts.fitting(self.task.train_problems())
        self._list_bad_rows()
        if not problems:
            raise SettingError(
                f"data.task gives no problem with a prompt of at most {self.prompts.max_tokens} tokens; "
                "check its data file and data.max_prompt_tokens"
            )
        return problems

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the training problems and their order."""
        found = hashlib.sha256()
        for problem in self.train:
            found.update(f"{problem.id}\0{problem.prompt}\0".encode("utf-8", "surrogatepass"))
        return found.hexdigest()

    @cached_property
    def benchmarks(self) -> list[Benchmark]:
        """Held-out problems by benchmark."""
        found: list[Benchmark] = [
            (name, self.prompts.fitting(problems)) for name, problems in self.task.benchmarks().items()
        ]
        for name, problems in found:
            if len(problems) < self.world_size:
                raise SettingError(
                    f"benchmark '{name}' of data.task has {len(problems)} problems with prompts that fit, fewer than "
                    f"there are ranks ({self.world_size}); give it more, or raise data.max_prompt_tokens"
                )
        self._list_bad_rows()
        return found

    def images_per_prompt(self, training: bool) -> int:
        """Returns the maximum number of images of one prompt, among all problems that will be asked."""
        asked = [problems for _, problems in self.benchmarks] + ([self.train] if training else [])
        return max((len(problem.images) for problems in asked for problem in problems), default=0)

    def _list_bad_rows(self) -> None:
        """Writes the rows that the task has left out so far, one per line."""
        bad = self.task.bad_rows()
        if bad and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / BAD_ROWS).write_text("".join(json.dumps(vars(row)) + "\n" for row in bad))
