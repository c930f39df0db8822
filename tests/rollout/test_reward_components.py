"""Settings that name a reward component which the task does not give are refused before anything is sampled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_models import fit, popo

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.rollout.limits import Limits
from popo_lightning.rollout.reward_components import try_components


def graded(answer: Any, text: str) -> dict[str, float]:
    """Gives a right answer a part that a wrong one lacks, and fails where the gold answer is nothing."""
    if answer is None:
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


def test_a_verifier_that_fails_on_both_answers_decides_nothing() -> None:
    try_components(started(None), [("model.reward_key", "bonsu")])


def test_limits_are_tried_too() -> None:
    try_components(started("4", length=5.0, bonus=0.1), [("model.reward_key", "score")])
    with pytest.raises(SettingError, match=r"cost of data\.limits\.bonsu is 'bonsu'"):
        try_components(started("4", bonsu=0.1), [("model.reward_key", "score")])


def test_parts_that_every_grade_has_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.rollout.reward_components.GradingPool", None)
    try_components(started("4"), [("model.reward_key", "score"), ("data.sampler.success_key", "acc")])


def test_overlong_is_a_component(policy: Path, tmp_path: Path) -> None:
    from popo_lightning.grading.overlong import SoftOverlong

    fit(policy, tmp_path, overlong=SoftOverlong(2), model={"reward_key": "overlong"}, iterations=1)
