"""Checks that the tests of objectives and methods notice wrong formulas: each of MUTATIONS must make one test fail."""

import importlib
import pkgutil
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from helpers.objective_mutations import MUTATIONS

import popo_lightning

HERE = Path(__file__).parent
SOURCE = Path(popo_lightning.__file__).parent
ROOMS = ("objectives", "methods")

TESTS = [
    "advantages_normalized",
    "weights",
    "trust_regions",
    "detached_regions",
    "sequence_regions",
    "adaptive_regions",
    "stale_regions",
    "regularizers",
    "aggregations",
    "objectives",
    "pair_loss",
]


def failing_tests(monkeypatch: pytest.MonkeyPatch, package: Path) -> list[str]:
    """Runs the tests in this process with the rooms of `package` in place of popo_lightning's."""
    names = [f"popo_lightning.{room}" for room in ROOMS]
    names += [f"{name}.{m.name}" for name in names for m in pkgutil.iter_modules([str(SOURCE / name.split(".")[1])])]
    true = {name: importlib.import_module(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    for room in ROOMS:
        monkeypatch.setattr(popo_lightning, room, true[f"popo_lightning.{room}"])  # the patch restores the true one
    monkeypatch.setattr(popo_lightning, "__path__", [str(package), *popo_lightning.__path__])
    importlib.invalidate_caches()
    monkeypatch.setitem(sys.modules, "helpers.objectives", None)  # the patch restores the true one
    del sys.modules["helpers.objectives"]
    tests = {}
    for name in TESTS:
        found = runpy.run_path(str(HERE / f"test_{name}.py"))
        tests |= {k: v for k, v in found.items() if k.startswith("test_")}
    used = tests["test_objective_by_hand"].__globals__["Objective"].__init__.__code__.co_filename
    assert used.startswith(str(package)), "the copy was not imported"
    failures = []
    for name, test in tests.items():
        try:
            test()
        except (Exception, pytest.fail.Exception):  # any failure counts as noticed
            failures.append(name)
    return failures


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        *((file, old, new) for file, found in MUTATIONS.items() for _, old, new in found),
        ("objectives/objective", "", ""),
    ],
    ids=[*(what for found in MUTATIONS.values() for what, _, _ in found), "unchanged"],
)
def test_mutation_is_noticed(file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ROOMS:
        shutil.copytree(SOURCE / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / f"{file}.py"
    text = path.read_text()
    if not old:  # unchanged source: the harness itself must not cause failures
        assert failing_tests(monkeypatch, tmp_path) == []
        return
    assert text.count(old) == 1, f"{old!r} must stand exactly once in {file}.py: bring this list up to date"
    path.write_text(text.replace(old, new))
    failures = failing_tests(monkeypatch, tmp_path)
    print(f"noticed by {len(failures)}: {', '.join(failures)}")
    assert failures
