"""The loader and the verifiers on the collected data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset import task
from helpers.places import SHARED

from popo_lightning.grading.pool import GradingPool
from popo_lightning.tasks.dataset import DatasetTask
from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.countdown import CountdownVerifier
from popo_lightning.verifiers.geometry import GeometryVerifier
from popo_lightning.verifiers.math import MathVerifier

REAL = SHARED / "data"
COUNTDOWN = {"answer": {"numbers": "numbers", "target": "target"}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the collected data sets are not in {REAL}")
FILES = {
    "math": {
        "aime24": 15, "aime25": 15, "amc23": 20, "amc22_23": 42, "math500": 250, "minerva": 136, "olympiadbench": 338,
        "gsm8k_test": 660, "gsm8k_train": 7473, "math_train": 7470, "aime_train": 969, "deepscaler_train": 29151,
        "dsr_sub_traces": 1207,
    },
    "planning": {
        "countdown34_train": 10737, "countdown34_mopps_test": 256, "countdown34_tinyzero_test": 512,
        "countdown_d1_cd3": 128, "countdown_sos4": 256,
    },
    "geometry": {"geometry3k_train": 400, "geometry3k_val": 149, "geometry3k_test": 298},
}  # fmt: skip
VERIFIERS: dict[str, Verifier] = {
    "math": MathVerifier(),
    "planning": CountdownVerifier(),
    "geometry": GeometryVerifier(),
}


def real_task(room: str, **settings: Any) -> DatasetTask:
    columns = {"columns": COUNTDOWN} if room == "planning" else {}
    sources = {name: {"path": f"{room}/{name}.jsonl", **columns} for name in FILES[room]}
    return task(
        sources[next(iter(sources))], benchmarks=sources, folder=str(REAL), verifier=VERIFIERS[room], **settings
    )


@needs_real
@pytest.mark.parametrize("room", FILES)
def test_every_real_file(room: str) -> None:
    found = real_task(room, template="Q: {prompt}", check_answers=False)
    problems = found.benchmarks()
    assert {name: len(them) for name, them in problems.items()} == FILES[room]
    assert not found.bad_rows()
    for name, them in problems.items():
        rows = [json.loads(line) for line in (REAL / room / f"{name}.jsonl").open(encoding="utf-8")]
        for row, problem in zip(rows, them, strict=True):
            assert problem.prompt == [{"role": "user", "content": "Q: " + row["prompt"]}]
            assert problem.id == f"{name}/{row['id']}"
            assert problem.images == tuple(str(REAL / room / image) for image in row["images"])
            whole = (
                {"numbers": row["numbers"], "target": row["target"]} if room == "planning" else row["answer"].strip()
            )
            assert problem.answer == whole


@needs_real
def test_real_gold_answers_are_right() -> None:
    """At least 99% of the loader's gold answers are right when they are written as an answer."""
    for room, names in {"math": ["math500", "gsm8k_test"], "geometry": ["geometry3k_val"]}.items():
        problems = [problem for name in names for problem in real_task(room, check_answers=False).benchmarks()[name]]
        with GradingPool(VERIFIERS[room], 2) as pool:
            grades = pool.grade([(problem.answer, rf"\boxed{{{problem.answer}}}") for problem in problems[:200]])
        assert sum(grade.parts["acc"] for grade in grades) >= 0.99 * len(grades)


@needs_real
@pytest.mark.parametrize("room", ["planning", "geometry"])
def test_real_golds_are_checked(room: str) -> None:
    found = real_task(room)
    assert {name: len(them) for name, them in found.benchmarks().items()} == FILES[room]


@needs_real
@pytest.mark.slow
def test_real_mathematics_is_checked() -> None:
    found = real_task("math")
    counts = {name: len(them) for name, them in found.benchmarks().items()}
    assert counts == FILES["math"] | {"deepscaler_train": 29149, "dsr_sub_traces": 1206}  # without cut-off golds
    assert [row.row for row in found.bad_rows()] == [18366, 19805, 1186]
