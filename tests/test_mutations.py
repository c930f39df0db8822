"""Do the tests of objectives notice a wrong formula? Each of objective_mutations.py must make one of them fail."""

import importlib
import pkgutil
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from objective_mutations import MUTATIONS

import popo_lightning
import popo_lightning.objectives

HERE = Path(__file__).parent
SOURCE = Path(popo_lightning.objectives.__file__).parent

TESTS = [
    "advantages_normalised",
    "weights",
    "trust_regions",
    "detached_regions",
    "sequence_regions",
    "adaptive_regions",
    "regularizers",
    "aggregations",
    "objectives",
]


def failing_tests(monkeypatch: pytest.MonkeyPatch, package: Path) -> list[str]:
    """Run the tests of objectives in this process with `package` in the place of popo_lightning.objectives."""
    for module in pkgutil.iter_modules([str(SOURCE)]):
        name = f"popo_lightning.objectives.{module.name}"
        importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "popo_lightning.objectives")
    monkeypatch.setattr(popo_lightning, "objectives", popo_lightning.objectives)  # to put the true one back
    monkeypatch.setattr(popo_lightning, "__path__", [str(package.parent), *popo_lightning.__path__])
    importlib.invalidate_caches()
    monkeypatch.setitem(sys.modules, "objectives_for_tests", None)  # to put the true one back
    del sys.modules["objectives_for_tests"]
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
        except (Exception, pytest.fail.Exception):  # however a test fails, it has noticed
            failures.append(name)
    return failures


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [*((file, old, new) for file, found in MUTATIONS.items() for _, old, new in found), ("objective", "", "")],
    ids=[*(what for found in MUTATIONS.values() for what, _, _ in found), "unchanged"],
)
def test_mutation_is_noticed(file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "objectives"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / f"{file}.py"
    text = path.read_text()
    if not old:  # unchanged source: the harness itself must not make tests fail
        assert failing_tests(monkeypatch, package) == []
        return
    assert text.count(old) == 1, f"{old!r} must stand exactly once in {file}.py: bring this list up to date"
    path.write_text(text.replace(old, new))
    failures = failing_tests(monkeypatch, package)
    print(f"noticed by {len(failures)}: {', '.join(failures)}")
    assert failures
