"""Gold answers that no response could match are found once, in processes that can be killed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset import ROW, task, write
from helpers.verifiers import AcceptsAll, NeverLoads, Picky, WantsMapping

from popo_lightning.core.errors import SettingError
from popo_lightning.grading.pool import GradingPool
from popo_lightning.tasks import gold_answers as answers
from popo_lightning.verifiers.base import Verifier


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_refused_gold_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(answers, "SECONDS_PER_ANSWER", 1.0)
    golds = ["fine", "bad one", "hang", "7", "bad one", "die", ["bad list"], "12.5", "also fine"]
    path = write(tmp_path / "rows.jsonl", *[{"prompt": "x", "answer": gold} for gold in golds])
    found = task(path, verifier=Picky())
    assert [p.answer for p in found.train_problems()] == ["fine", "7", "12.5", "also fine"]
    assert [row.row for row in found.bad_rows()] == [2, 3, 5, 6, 7]
    why = {row.row: row.reason for row in found.bad_rows()}
    assert "Picky refuses: it says bad; correct or remove it" in why[2] and why[7] == why[2]
    assert "over 1 s" in why[3] and "crash" in why[6]
    with pytest.raises(SettingError, match="5 of 9 rows"):
        task(path, verifier=Picky(), strict=True).train_problems()
    assert len(task(path, verifier=Picky(), check_answers=False).train_problems()) == 9


class Forbidden:
    def __init__(self, *args: Any) -> None:
        raise AssertionError("a grading process was started")


def test_verdicts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *[{"prompt": "x", "answer": gold} for gold in ("fine", "bad", "wrong")])

    def read(verifier: Verifier) -> list[str]:
        return [problem.answer for problem in task(path, verifier=verifier).train_problems()]

    assert read(Picky()) == ["fine", "wrong"]
    with monkeypatch.context() as patch:
        patch.setattr(answers, "GradingPool", Forbidden)
        assert read(Picky()) == ["fine", "wrong"]
        assert read(AcceptsAll()) == ["fine", "bad", "wrong"]  # checks nothing, so no process starts
        with pytest.raises(AssertionError):
            read(Picky("wrong"))  # another setting
        with pytest.raises(AssertionError):
            read(WantsMapping())  # another class
        write(path, {"prompt": "x", "answer": "another"})
        with pytest.raises(AssertionError):
            read(Picky())
    write(path, *[{"prompt": "x", "answer": gold} for gold in ("fine", "bad", "wrong")])
    for file in (own_cache / "answers").glob("*.json"):
        file.write_text('{"\\"wrong\\"": 5')
    assert read(Picky()) == ["fine", "wrong"]  # the cache is broken, so it checks again
    assert read(Picky("wrong")) == ["fine", "bad"]


def test_unusable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "file"))
    path = write(tmp_path / "rows.jsonl", ROW, {"prompt": "x", "answer": "bad"})
    assert len(task(path, verifier=Picky()).train_problems()) == 1
    assert "cannot be used" in caplog.text


def test_plain_numbers_are_checked_as_long_as_they_fail(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *[{"prompt": "x", "answer": str(n)} for n in range(5)])
    with pytest.raises(SettingError, match=r"no problem out of 5 rows: row 1 .*WantsMapping refuses: it is no mapping"):
        task(path, verifier=WantsMapping()).train_problems()


def test_one_plain_number_speaks_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Any]] = []

    class Watched(GradingPool):
        def grade(self, items: Any) -> Any:
            asked.append([answer for answer, _ in items])
            return super().grade(items)

    monkeypatch.setattr(answers, "GradingPool", Watched)
    golds = ["1", "-2.50", "x", "1", "3", "x", "1e5", "1" * 20]
    path = write(tmp_path / "rows.jsonl", *[{"prompt": "x", "answer": gold} for gold in golds])
    assert len(task(path, verifier=Picky()).train_problems()) == 8
    assert [sorted(part) for part in asked] == [["1", "1" * 20, "1e5", "x"]]


def test_verifier_that_does_not_load(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROW)
    with pytest.raises(SettingError, match=r"data\.task\.verifier is NeverLoads.*some library is not installed"):
        task(path, verifier=NeverLoads()).train_problems()


def test_verifier_travels(tmp_path: Path) -> None:
    found = task(write(tmp_path / "rows.jsonl", ROW))
    (problem,) = found.train_problems()
    assert pickle.loads(pickle.dumps(problem)) == problem
    with GradingPool(found.verify) as pool:
        assert [grade.parts["acc"] for grade in pool.grade([(problem.answer, "2"), (problem.answer, "3")])] == [1, 0]
