"""scripts/demo.sh, stopped by Ctrl-C and continued by the command that it prints. A stand-in trains."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from helpers.places import REPOSITORY

# Records its arguments. Trains until it is told to stop, and ends at once if it resumes.
POPO = """#!/usr/bin/env bash
echo "$*" >> calls
case "$*" in
*"--run.resume true"*) echo "goes on"; exit 0 ;;
esac
trap 'echo "saved; continue by: popo fit"; exit 130' INT
echo training
while true; do sleep 0.05; done
"""


def place(folder: Path) -> None:
    (folder / "scripts").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts" / "demo.sh", folder / "scripts")
    written = {
        "scripts/setup.sh": "",
        ".venv/bin/popo": POPO,
        ".venv/.popo-engine": "vllm\n",
        ".venv/bin/python": '#!/usr/bin/env bash\necho "table of $2"\n',
    }
    for name, text in written.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def test_ctrl_c_and_the_command_that_goes_on(tmp_path: Path) -> None:
    place(tmp_path)
    environment = {"PATH": os.environ["PATH"], "ITERATIONS": "6", "SEED": "2"}
    command = ["bash", "scripts/demo.sh", "--data.composer", "a b"]
    begun = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    calls = tmp_path / "calls"
    until = time.monotonic() + 60
    cores = min(2, os.cpu_count() or 1)
    while not calls.exists() or len(calls.read_text().splitlines()) < cores or not list(tmp_path.glob("runs/*/*.log")):
        assert time.monotonic() < until and begun.poll() is None
        time.sleep(0.05)
    while any("training" not in log.read_text() for log in tmp_path.glob("runs/*/*.log")):
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    out, _ = begun.communicate(timeout=60)
    assert begun.returncode == 130
    (folder,) = (tmp_path / "runs").iterdir()
    *said, last = out.splitlines()
    assert [line for line in said if "saved; continue by" in line], "what the runs say is shown to its end"
    again = f"DEMO=runs/{folder.name} SEED=2 ITERATIONS=6 bash scripts/demo.sh --data.composer a\\ b"
    assert last == f"demo: stopped; continue by: {again}"
    calls.unlink()
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", again], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"table of runs/{folder.name}"
    for line in calls.read_text().splitlines():
        assert f"--run.root runs/{folder.name}" in line and "--seed_everything 2" in line
        assert "--trainer.max_epochs 6" in line and "--run.resume true" in line and line.endswith("a b")
