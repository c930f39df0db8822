"""A job that SLURM preempts or whose time is up is saved, and the documented script requeues on its exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.tiny_models import REPOSITORY, method, popo

from runs.test_resume import checkpoint
from runs.test_stopping import at

SCRIPT = re.compile(r"```bash\n(#!/bin/bash\n.*?)```", re.DOTALL)
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
JOB |= {"SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost"}
LAUNCHED = {"by srun": JOB, "by another launcher": {"SLURM_JOB_ID": "7"}}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("launched", LAUNCHED)
def test_a_preempted_run_is_saved(
    config: Path,
    tmp_path: Path,
    launched: str,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in LAUNCHED[launched].items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)  # the default action would end the tests
    quick = ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", "0", "--trainer.max_epochs", "3"]
    command = ["fit", "--config", config, *method("popo"), *quick, "--run.folder", tmp_path, "--run.resume", "true"]
    try:
        with pytest.raises(SystemExit) as ended:
            popo(*command, *at("on_train_batch_start", 2, 1, number))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended.value.code == 128 + number
    assert f"stopped by {number.name} after iteration 2, minibatch 2 of 3" in capsys.readouterr().err
    checkpoint(tmp_path, 5)
    assert not list(tmp_path.glob("hpc_ckpt*"))
    assert popo(*command).trainer.global_step == 9  # the requeued job does the same


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Writes the script of the docs, with fake SLURM commands that record their arguments."""
    (found,) = SCRIPT.findall((REPOSITORY / "docs" / "multi_node.md").read_text())
    script = tmp_path / "job.sh"
    script.write_text(found)
    srun = 'echo "$@" >> "$NOTES"; [ -z "$SLEEPS" ] || sleep "$SLEEPS"; exit "$CODE"'
    for name, body in {"srun": srun, "scontrol": 'echo "scontrol $@" >> "$NOTES"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return script


def started(job: Path, code: int, sleeps: str = "") -> subprocess.Popen[str]:
    given = {"PATH": f"{job.parent}:{os.environ['PATH']}", "NOTES": str(job.parent / "notes"), "CODE": str(code)}
    return subprocess.Popen(
        ["bash", str(job)], env=os.environ | given | {"SLURM_JOB_ID": "7", "SLEEPS": sleeps}, text=True
    )


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (138, True), (143, True)])
def test_the_script_requeues_what_was_stopped(job: Path, code: int, requeued: bool) -> None:
    """Jobs that would fail again and again are not requeued."""
    assert started(job, code).wait(20) == code
    ran, *more = (job.parent / "notes").read_text().splitlines()
    assert ran.startswith("popo fit") and ran.endswith("--run.resume true")
    assert more == (["scontrol requeue 7"] if requeued else [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_script_outlives_the_signal(job: Path, number: signal.Signals) -> None:
    process = started(job, 143, sleeps="2")
    while not (job.parent / "notes").exists():
        pass
    process.send_signal(number)
    assert process.wait(20) == 143
    assert (job.parent / "notes").read_text().splitlines()[-1] == "scontrol requeue 7"
