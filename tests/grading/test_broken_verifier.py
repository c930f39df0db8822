"""A verifier that fails for every response stops the run in its first iteration, on all ranks alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.graders import FailsOn
from helpers.processes import on_two_ranks, trainer_of
from helpers.tiny_models import fit, method, popo, tiny_task

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.policy import PolicyModule
from popo_lightning.proximal.snapshot import ProximalSnapshot


class Graded(Task):
    """The tiny task with another verifier."""

    def __init__(self, verify: Any) -> None:
        self.verify = verify
        self._task = tiny_task()

    def train_problems(self) -> Sequence[Problem]:
        return self._task.train_problems()

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        return {}


class BrokenTask(Graded):
    """The tiny task and its benchmark, with a verifier that always fails."""

    def __init__(self) -> None:
        super().__init__(FailsOn(0))

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        return self._task.benchmarks()


@pytest.mark.parametrize("command", ["validate", "test", "predict", "fit"])
def test_an_evaluation_whose_every_grade_fails_stops_with_the_reason(
    config: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The evaluation before training stops the run. predict keeps its responses."""
    broken = ["--data.task", f"{__name__}.BrokenTask", "--run.folder", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        popo(command, "--config", config, *(method("popo") if command == "fit" else []), *broken)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "none of the 36 responses to benchmark 'countdown' could be graded: the verifier raised KeyError" in said
    assert (tmp_path / "responses.jsonl").exists() == (command == "predict")
    assert not list(tmp_path.rglob("results.json"))


def test_a_run_whose_every_grade_fails_stops_with_the_reason(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingError,
        match=r"none of the 40 responses .* the verifier raised KeyError: 'solution' at graders.py:\d+ for",
    ):
        fit(policy, tmp_path, task=Graded(FailsOn(0)), iterations=1)


class FailsLater(FailsOn):
    """Grades until a file exists."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = str(file)

    def __call__(self, gold: Any, text: str) -> dict[str, float]:
        if Path(self.file).exists():
            raise OSError("the sandbox is gone")
        return super().__call__(gold, text)


@pytest.mark.slow
def test_a_grader_that_fails_later_stops_nothing(policy: Path, tmp_path: Path) -> None:
    """The training so far is worth keeping, and a lost service may return."""
    verify = FailsLater(tmp_path / "gone")

    class Removes(ProximalSnapshot):
        def on_train_epoch_end(self, *args: Any) -> None:
            Path(verify.file).touch()

    rows = fit(policy, tmp_path, task=Graded(verify), iterations=2, proximal=Removes()).rows
    assert [row["rollout/grading_failures"] for row in rows] == [0, 40]


def stopped(policy: str, *cases: Sequence[int]) -> list[str]:
    """Returns what runs of one iteration raise on this rank when graders fail on some ranks."""
    return [_stopped(policy, failing) for failing in cases]


def _stopped(policy: str, failing: Sequence[int]) -> str:
    module = PolicyModule(path=policy)
    settings: dict[str, Any] = {"problems_per_iteration": 4, "group_size": 2, "minibatches": 1}
    settings |= {"max_new_tokens": 8, "max_prompt_tokens": 16}
    data = RolloutDataModule(Graded(FailsOn(*failing)), TransformersEngine(), **settings)
    trainer = trainer_of("ddp", 2, 1, [ProximalSnapshot()])
    try:
        trainer.fit(module, data)
    except SettingError as error:
        return str(error)
    return ""


def test_all_ranks_stop_or_none(policy: Path, tmp_path: Path) -> None:
    first, second = on_two_ranks(stopped, tmp_path, str(policy), [0], [0, 1])
    assert first == second
    assert first[0] == "" and "none of the 8 responses" in first[1]
    assert "RANK" not in os.environ
