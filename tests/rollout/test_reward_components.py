"""Settings that name a reward component which the task does not give are refused before anything is sampled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.groups import response
from helpers.tiny_models import fit, popo, tiny_task

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.replay.composer import OnPolicy
from popo_lightning.rollout import iteration
from popo_lightning.rollout.limits import Limits
from popo_lightning.rollout.reward_components import try_components


def graded(answer: Any, text: str) -> dict[str, float]:
    """Gives a right answer a part that a wrong one lacks, and fails where the gold answer is nothing."""
    if answer is None or (answer == "half" and not text):
        raise ValueError("nothing to compare with")
    return {"score": 1.0, "bonus": 0.5} if text == answer else {"score": 0.0}


def started(gold: Any, **limits: float) -> SimpleNamespace:
    """A data module with one problem."""
    train = [Problem(id="0", prompt="?", answer=gold)]
    return SimpleNamespace(
        limits=Limits(limits, max_new_tokens=9),
        task=SimpleNamespace(verify=graded),
        problems=SimpleNamespace(train=train),
        grading_timeout=5.0,
        overlong=None,
    )


@pytest.mark.parametrize("setting", ["model.reward_key", "data.effective_key"])
def test_nothing_is_loaded_or_sampled(
    setting: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, f"--{setting}", "fromat", "--run.folder", tmp_path)
    assert stopped.value.code == 2
    assert f"{setting} is 'fromat', which the task does not give; did you mean format?" in capsys.readouterr().err
    assert not (tmp_path / "samples.jsonl").exists()
    assert not (tmp_path / "metrics.csv").exists(), "the first evaluation was made"


def test_a_part_of_right_answers_alone_is_known() -> None:
    try_components(started("4"), [("model.reward_key", "bonus")])
    with pytest.raises(SettingError, match=r"model\.reward_key is 'bonsu'.* did you mean bonus\?"):
        try_components(started("4"), [("model.reward_key", "bonsu")])


def test_a_gold_answer_that_is_not_right_as_text_decides_nothing() -> None:
    assert try_components(started({"target": 4}), [("model.reward_key", "bonsu")]) == set()


@pytest.mark.parametrize("gold", [None, "half"])
def test_an_answer_that_cannot_be_graded_decides_nothing(gold: str | None) -> None:
    assert try_components(started(gold), [("model.reward_key", "bonsu")]) == set()


class OnlyRight:
    """Grades like the task, and gives right answers a component that wrong ones lack."""

    def __init__(self, verify: Any) -> None:
        self.verify = verify

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        parts: dict[str, float] = self.verify(answer, text)
        return parts | ({"bonus": 1.0} if parts["score"] == 1 else {})


def test_an_iteration_without_a_right_answer_ends_no_run(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Countdown's gold answer is no text that is right, so the component is first seen in a sampled response."""
    task = tiny_task()
    task.verify = OnlyRight(task.verify)
    seen: list[set[str]] = []
    check = iteration.check_components

    def checked(named: Any, given: set[str]) -> None:
        seen.append(set(given))
        check(named, given)

    monkeypatch.setattr(iteration, "check_components", checked)
    fit(policy, tmp_path, task=task, composer=OnPolicy(), effective_key="bonus", iterations=2)
    assert "bonus" in seen[0] and seen[0] <= seen[-1]
    wrong = SimpleNamespace(responses=[response(score=0.0)])
    found = iteration.IterationRollouts.__new__(iteration.IterationRollouts)
    found.data, found.limits = SimpleNamespace(components={"score", "acc", "bonus"}), Limits()  # type: ignore[assignment]
    vars(found)["_named_components"] = [("data.effective_key", "bonus")]
    found._check_components([wrong])  # type: ignore[list-item]


def test_limits_are_tried_too() -> None:
    assert "bonus" in try_components(started("4", length=5.0, bonus=0.1), [("model.reward_key", "score")])
    with pytest.raises(SettingError, match=r"cost of data\.limits\.bonsu is 'bonsu'"):
        try_components(started("4", bonsu=0.1), [("model.reward_key", "score")])


def test_parts_that_every_grade_has_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.rollout.reward_components.GradingPool", None)
    try_components(started("4", length=5.0), [("model.reward_key", "score"), ("data.sampler.success_key", "acc")])


def test_overlong_is_a_component(policy: Path, tmp_path: Path) -> None:
    from popo_lightning.grading.overlong import SoftOverlong

    fit(policy, tmp_path, overlong=SoftOverlong(2), model={"reward_key": "overlong"}, iterations=1)
