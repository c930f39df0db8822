"""The folders of examples/ run as their READMEs say, through the installed command and from their own folders."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.forked import run_forked
from helpers.places import REPOSITORY
from helpers.tiny_models import metrics

from popo_lightning import __main__ as command_line

EXAMPLES = REPOSITORY / "examples"
COMMAND = Path(sys.executable).with_name("popo")
PAIRS = [(a, b) for a in range(1, 9) for b in range(1, a)]
SHORT = ["--trainer.max_epochs", "3", "--evaluation.every_n_iterations", "0"]


def command(folder: str, config: Path, run: Path) -> list[str]:
    """Returns the arguments of `popo` in a README, with the tests' policy and three iterations."""
    block = re.search(r"```bash\n(.*?)```", (EXAMPLES / folder / "README.md").read_text(), re.DOTALL)
    assert block is not None
    change, line = block[1].strip().splitlines()
    assert change == f"cd examples/{folder}" and line.startswith("popo fit ")
    task = "../../configs/task/countdown_tiny.yaml"
    assert task in line and (EXAMPLES / folder / task).exists()
    return [*shlex.split(line.replace(task, str(config)))[1:], *SHORT, "--run.folder", str(run)]


def run_here(folder: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the command in this process, from an example's folder."""
    monkeypatch.chdir(EXAMPLES / folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["popo", *args])
    command_line.main()


@pytest.mark.slow
@pytest.mark.skipif(not COMMAND.exists(), reason="needs the popo command beside this interpreter")
def test_own_method_through_the_installed_command(config: Path, tmp_path: Path) -> None:
    """A copy of the folder runs elsewhere, where only the command can find the class."""
    copy = tmp_path / "own_method"
    shutil.copytree(EXAMPLES / "own_method", copy)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    args = [COMMAND, *command("own_method", config, tmp_path / "run")]
    done = subprocess.run(args, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert sum(row.get("replay/groups", 0) for row in rows) > 0


def test_own_reward(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have two numbers, which the tests' policy knows. Some of its wrong responses earn a part of the reward."""
    train = [{"prompt": f"{a},{b}>{a + b}:", "answer": {"numbers": [a, b], "target": a + b}} for a, b in PAIRS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    sources = ["--data.task.train", f"[{{path: {tmp_path}/rows.jsonl}}]"]
    run_here("own_reward", [*command("own_reward", config, tmp_path / "run"), *sources], monkeypatch)
    rows = [row for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert len(rows) == 3
    assert all(row["rollout/grading_failures"] == 0 for row in rows)
    assert rows[0]["reward/acc"] < rows[0]["reward/score"] < rows[0]["reward/format"]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("2+7=9;9+5=14", 1),
        ("7-2=5;5*2=10", 0),
        ("7-2=5;5+5=10", 0.25),
        ("7-5=2;2+2=4", 0.5 * 0.5**2.5),
        ("14", 0),
        ("", 0),
    ],
)
def test_near_target(text: str, score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_reward"))
    from near_target import NearTarget

    assert NearTarget()({"numbers": [2, 5, 7], "target": 14}, text)["score"] == pytest.approx(score)


def test_own_task(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems have two numbers, which the tests' policy knows."""
    two = ["--data.task.numbers", "2", "--data.task.largest_number", "9"]
    run_here("own_task", [*command("own_task", config, tmp_path / "run"), *two], monkeypatch)
    rows = [row for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert len(rows) == 3
    assert all(row["rollout/grading_failures"] == 0 for row in rows)
    assert rows[0]["reward/acc"] < rows[0]["reward/score"]


def test_largest_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_task"))
    from largest_result import LargestResult

    task = LargestResult()
    train, held_out = task.train_problems(), task.benchmarks()["largest_result"]
    assert {problem.id for problem in train}.isdisjoint(problem.id for problem in held_out)
    assert len(train) + len(held_out) == 12 * 13 * 14 / 6
    problem = next(problem for problem in (*train, *held_out) if problem.id == "2,5,7")
    assert problem.answer == {"numbers": [2, 5, 7], "largest": 70}
    assert task.verify(problem.answer, "7*5=35;35*2=70")["score"] == 1
    assert task.verify(problem.answer, "7+5=12;12*2=24")["score"] == 24 / 70
    assert task.verify(problem.answer, "7*5=36;36*2=72")["score"] == 0


@pytest.mark.parametrize("installed", [True, False])
def test_the_notebook_installs_the_package_where_it_is_not(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Colab, for example, only the notebook is at hand."""
    content = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    first = next("".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code")
    started: list[list[str]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: started.append(command))
    found: dict[str, Any] = {}
    exec(first, found)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", found["SOURCE"], "matplotlib"]
    assert started == ([] if installed else [pip])
    assert "import popo_lightning" not in first


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """Its cells run one after another in a separate process, for a few iterations."""
    content = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in content["cells"]), "commit it without outputs"
    program = "import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(cells)
    assert program.count("ITERATIONS = 40") == 1
    script = tmp_path / "cells.py"
    script.write_text(program.replace("ITERATIONS = 40", "ITERATIONS = 4"))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = run_forked([script], environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "runs" / "quickstart").rglob("summary.json"))) == 3
