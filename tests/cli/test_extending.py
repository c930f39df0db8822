"""Every skeleton of docs/extending.md trains, and every snippet of docs/python.md runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers.forked import run_forked
from helpers.places import REPOSITORY
from helpers.snippets import blocks
from helpers.tiny_models import TASK, environment, metrics

EXTENDING = (REPOSITORY / "docs" / "extending.md").read_text()
SECTIONS = {
    section.partition("\n")[0]: section for section in EXTENDING.split("\n## ") if "```bash\npopo fit" in section
}
SHORT = "--trainer.max_epochs 1 --evaluation.every_n_iterations 0 --evaluation.at_start false --run.folder run"
SNIPPETS = [
    block.text for block in blocks((REPOSITORY / "docs" / "python.md").read_text()) if block.language == "python"
]
README = [block.text for block in blocks((REPOSITORY / "README.md").read_text()) if "popo_lightning.fit" in block.text]


def started(args: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return run_forked(args, environment(), cwd=folder)


def test_every_slot_has_a_skeleton() -> None:
    slots = re.findall(r"^\| \[.*?\]\(#([\w-]+)\) \|", EXTENDING, re.MULTILINE)
    assert slots == [name.lower().replace(" ", "-") for name in SECTIONS] and len(slots) == 13


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_a_skeleton_trains(name: str, config: Path, tmp_path: Path) -> None:
    """Follows the page, with the tests' policy in place of its task."""
    found = list(blocks(SECTIONS[name]))
    for block in found:
        if block.language == "python":
            file = re.match(r"# (\w+\.py)\n", block.text)
            assert file is not None
            (tmp_path / file[1]).write_text(block.text)
    (command,) = (block.text for block in found if block.language == "bash" and "\n" in block.text)
    words = shlex.split(command.replace("task/countdown_tiny", str(config)) + SHORT)[1:]
    if "Regraded" in command:
        numbers = ", ".join(f"{name}: {value}" for name, value in TASK.items())
        words = [word.replace("class_path: CountdownSteps}", f"class_path: CountdownSteps, init_args: {{{numbers}}}}}")
                 for word in words]  # fmt: skip
    done = started(["-m", "popo_lightning", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = (row for row in metrics(tmp_path / "run") if "train/loss" in row)
    assert row["rollout/grading_failures"] == 0
    assert Path(tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(SNIPPETS)))
def test_a_python_snippet_runs(place: int, config: Path, tmp_path: Path) -> None:
    run(SNIPPETS[place], config, tmp_path)


@pytest.mark.slow
def test_the_readmes_snippet_runs(config: Path, tmp_path: Path) -> None:
    (snippet,) = README
    run(snippet, config, tmp_path)


def run(snippet: str, config: Path, folder: Path) -> None:
    """Runs a snippet with the tests' policy and fewer iterations."""
    numbers = ", ".join(f"{name}={value!r}" for name, value in TASK.items())
    for words, instead in {
        '"countdown_tiny"': repr(str(config)),
        "CountdownSteps()": f"CountdownSteps({numbers})",
        "CountdownWarmStart()": "CountdownWarmStart(**POLICY)",
    }.items():
        snippet = snippet.replace(words, instead)
    snippet = snippet.replace(
        "import lightning as L\n", "import lightning as L\nfrom helpers.tiny_models import POLICY\n"
    )
    (folder / "snippet.py").write_text(re.sub(r'"max_epochs": \d+', '"max_epochs": 1', snippet))
    done = started(["snippet.py"], folder)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
