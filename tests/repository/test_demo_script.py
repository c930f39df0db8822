"""scripts/demo.sh: which engine samples and what a reader sees. The runs are faked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.places import REPOSITORY

TOOLS = ("dirname", "date", "mkdir", "cat", "sleep", "getconf")  # tools that a Mac has too: no tail --pid, no sed -u
POPO = """echo "$*"
trap 'echo stopped; exit 130' INT
for i in 1 2 3; do echo "$i of 3"; sleep 0.1; done
if [ "${HANG:-}" ]; then while :; do sleep 0.1; done; fi
printf 'the end'"""


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Returns a folder with the script and an environment with faked programs."""
    for folder in ("scripts", "venv/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts" / "demo.sh", tmp_path / "scripts")
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    bodies = {"bin/bash": 'echo "$@"', "venv/bin/popo": POPO, "venv/bin/python": 'echo report "$@"'}
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def started(demo: Path, engine: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    (demo / "venv" / ".popo-engine").write_text(f"{engine}\n")
    environment = {"PATH": str(demo / "bin"), "POPO_VENV": str(demo / "venv"), **variables}
    command = [str(shutil.which("bash")), str(demo / "scripts" / "demo.sh"), "--model.temperature", "0.9", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.parametrize("engine", ["vLLM", "transformers"])
def test_both_runs_are_shown_line_by_line(demo: Path, engine: str) -> None:
    said, _ = started(demo, engine, ITERATIONS="7").communicate(timeout=60)
    lines = said.splitlines()
    assert lines[0] == "scripts/setup.sh" and lines[-1].startswith("report scripts/demo_report.py runs/demo-")
    for method in ("popo", "grpo"):
        command, *rest = [line.removeprefix(f"{method}  ") for line in lines if line.startswith(f"{method}  ")]
        assert rest == ["1 of 3", "2 of 3", "3 of 3", "the end"]
        assert command.startswith("fit --config task/countdown_tiny") and f"--config method/{method}" in command
        assert command.endswith("--model.temperature 0.9") and "--trainer.max_epochs 7" in command
        assert ("--data.engine TransformersEngine" in command) == (engine == "transformers")


@pytest.mark.parametrize("argument", ["--run.root", "--run.root=elsewhere", "--run.folder"])
def test_a_folder_in_the_arguments_is_refused(demo: Path, argument: str) -> None:
    """The table at the end is of one folder, which the script chooses."""
    refused = started(demo, "vLLM", argument, "elsewhere")
    said, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2 and len(said.splitlines()) == 1
    assert argument in said and "DEMO=FOLDER" in said


def test_ctrl_c_reaches_both_runs(demo: Path) -> None:
    script = started(demo, "vLLM", HANG="yes")
    logs = list(demo.glob("runs/*/*.log"))
    until = time.monotonic() + 60
    while sum("3 of 3" in log.read_text() for log in logs) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        logs = list(demo.glob("runs/*/*.log"))
    os.kill(script.pid, signal.SIGINT)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 130
    assert {"popo  stopped", "grpo  stopped"} <= set(said.splitlines()) and "report" not in said
