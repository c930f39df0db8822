"""The problems that a run can ask, and the list of rows that gave none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from helpers.tiny_models import fit, tiny_task

from popo_lightning.core.problems import Problem
from popo_lightning.core.task import BadRow
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.rollout.problem_sets import BAD_ROWS, ProblemSets
from popo_lightning.toys.countdown import CountdownSteps


class WithBadRows(CountdownSteps):
    """Finds a bad row at each reading of a set, and counts the readings."""

    def __init__(self) -> None:
        super().__init__(**{key: value for key, value in vars(tiny_task()).items() if not key.startswith("_")})
        self.read: list[str] = []

    def train_problems(self) -> list[Problem]:
        self.read.append("train.jsonl")
        return super().train_problems()

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        self.read.append("held_out.jsonl")
        return super().benchmarks()

    def bad_rows(self) -> Sequence[BadRow]:
        return [BadRow(name, 7, "is no JSON; correct it") for name in self.read]


def listed(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / BAD_ROWS).read_text().splitlines()]


def test_a_run_lists_the_rows_it_left_out(policy: Path, tmp_path: Path) -> None:
    fit(policy, tmp_path, task=WithBadRows(), iterations=1)
    assert {"source": "train.jsonl", "row": 7, "reason": "is no JSON; correct it"} in listed(tmp_path)


def test_sets_are_read_and_listed_once(policy: Path, tmp_path: Path) -> None:
    task = WithBadRows()
    sets = ProblemSets(task, PromptEncoder(policy, 16), 1, tmp_path / "run")
    for _ in range(2):
        assert sets.benchmarks[0][0] == "countdown" and len(sets.train) > 0
        assert sets.images_per_prompt(training=True) == 0
    assert task.read == ["held_out.jsonl", "train.jsonl"]
    assert [row["source"] for row in listed(tmp_path / "run")] == task.read


def test_other_ranks_write_nothing(policy: Path, tmp_path: Path) -> None:
    assert len(ProblemSets(WithBadRows(), PromptEncoder(policy, 16), 1, None).train) > 0
    assert list(tmp_path.iterdir()) == []
