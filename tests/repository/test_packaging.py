"""The package's metadata: version, types, citation, changelog, hooks and the workflow."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers.places import REPOSITORY
from helpers.tiny_models import environment

from popo_lightning import __main__, __version__

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_the_version_takes_no_torch() -> None:
    code = "import atexit, sys; sys.argv = ['popo', '--version']\nfrom popo_lightning.__main__ import main\n"
    code += "heavy = ('torch', 'lightning', 'numpy', 'vllm')\n"
    code += "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\nmain()"
    said = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [f"popo {__version__}", "[]"]


def test_a_version_among_other_words_is_a_setting_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["popo", "fit", "--version"])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 2


def test_top_level_help_names_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["popo", "--help"])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--version" in said and "compare" in said


def test_types_travel_with_the_package() -> None:
    assert (REPOSITORY / "popo_lightning" / "py.typed").read_bytes() == b""
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["popo_lightning"]
    assert "Typing :: Typed" in PYPROJECT["project"]["classifiers"]


def test_a_licence_is_said_once() -> None:
    """Build backends refuse a licence classifier together with a licence expression."""
    assert not [one for one in PYPROJECT["project"]["classifiers"] if one.startswith("License")]


def test_the_docs_tools_are_part_of_dev() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["dev"])  # so that the tests build the site


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.*)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0].split()[0] == __version__
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \((unreleased|\d{4}-\d\d-\d\d)\)", heading) for heading in headings)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def commands(path: Path) -> list[str]:
    """Returns the commands of a workflow's steps."""
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_the_workflow_calls_the_readmes_commands() -> None:
    run = commands(REPOSITORY / ".github" / "workflows" / "tests.yml")
    readme = (REPOSITORY / "README.md").read_text()
    assert run == ["bash scripts/demo.sh", "bash scripts/test.sh"]
    assert all(line in readme for line in run)


def test_the_hooks_are_the_checks_of_the_test_script() -> None:
    """Hooks use the versions in .venv. With their own pins they would format differently from the tests."""
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    entries = [hook["entry"] for hook in hooks[0]["hooks"]]
    script = (REPOSITORY / "scripts" / "test.sh").read_text()
    for tool in ("ruff check", "ruff format", "mypy"):
        assert any(tool in entry.replace('"', "") for entry in entries), tool
        assert tool.split()[0] in script
