"""The Dockerfile copies and runs only files that exist. The tests do not build it."""

from __future__ import annotations

import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers.places import REPOSITORY

from popo_lightning import __main__

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
IGNORED = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
PAGE = (REPOSITORY / "docs" / "install.md").read_text()


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def ignored(path: str) -> bool:
    """Matches as Docker does for patterns without exceptions: from the top, and with everything below."""
    parts = Path(path).parts
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(
        fnmatch(one, pattern.removeprefix("**/"))
        for pattern in IGNORED
        for one in (parts if pattern.startswith("**/") else above)
    )


def test_the_set_up_finds_what_it_reads() -> None:
    steps = instructions()
    copied = next(number for number, step in enumerate(steps) if step == ("COPY", ". ."))
    ran = next(number for number, step in enumerate(steps) if step == ("RUN", "bash scripts/setup.sh"))
    assert copied < ran
    needed = [
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "scripts/setup.sh",
        "constraints/cpu.txt",
        "constraints/gpu.txt",
        "scripts/pip_settings.py",
    ]
    needed += [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "popo_lightning").rglob("*.py")]
    needed += [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").rglob("*.yaml")]
    assert [path for path in needed if not (REPOSITORY / path).is_file() or ignored(path)] == []
    assert ignored(".venv/bin/python") and ignored("popo_lightning/core/__pycache__/x.pyc") and ignored("runs/a/b")


def test_arguments_and_environment_are_those_of_the_set_up() -> None:
    steps = instructions()
    arguments = {text.partition("=")[0]: text.partition("=")[2] for name, text in steps if name == "ARG"}
    assert arguments == {"PYTHON": "3.12", "DEVICE": "cpu"}
    environment = dict(word.split("=", 1) for name, text in steps if name == "ENV" for word in shlex.split(text))
    script = (REPOSITORY / "scripts" / "setup.sh").read_text()
    for name in ("POPO_DEVICE", "POPO_VENV"):
        assert name in environment and name in script
    assert environment["PATH"].split(":")[0] == f"{environment['POPO_VENV']}/bin"
    (entry,) = [text for name, text in steps if name == "ENTRYPOINT"]
    assert entry == '["popo"]'
    low, high = re.search(r"\((\d+), (\d+)\) <= sys.version_info\[:2\] < ", script).groups()  # type: ignore[union-attr]
    assert tuple(map(int, arguments["PYTHON"].split("."))) >= (int(low), int(high))


def test_the_pages_commands_are_the_dockerfiles() -> None:
    given = re.findall(r"--build-arg (\w+)=(\S+)", PAGE + DOCKERFILE)
    assert given and all(name in ("DEVICE", "PYTHON") for name, _ in given)
    assert {value for name, value in given if name == "DEVICE"} <= {"cpu", "gpu"}
    (folder,) = [text for name, text in instructions() if name == "WORKDIR"]
    assert PAGE.count(f":{folder}/runs") == 2
    for name in re.findall(r"--config ((?:task|method)/\w+)", PAGE):
        assert (REPOSITORY / "configs" / f"{name}.yaml").is_file()


def test_windows_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "argv", ["popo", "fit"])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    (sentence,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "WSL" in sentence and "docs/install.md" in sentence
