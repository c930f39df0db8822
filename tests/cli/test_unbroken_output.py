"""Readers that go away, and Ctrl-C while the command loads."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_models import environment

POPO = [sys.executable, "-m", "popo_lightning"]
WRITES = """
import sys, time
from popo_lightning.core.unbroken_output import keep_output_unbroken
keep_output_unbroken()
for number in range(3):
    print(number, flush=True)
    print("e", number, file=sys.stderr)
    time.sleep(0.5)
open("ended", "w").close()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("kept_open", [False, True])
def test_a_reader_that_goes_away_does_not_end_a_command(kept_open: bool, unbuffered: str, tmp_path: Path) -> None:
    variables = environment() | {"PYTHONUNBUFFERED": unbuffered}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES], env=variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"0\n"
    if kept_open:
        assert writer.communicate()[0].splitlines() == [b"e 0", b"1", b"e 1", b"2", b"e 2"]
    else:
        writer.stdout.close()
    assert writer.wait(timeout=60) == 0 and (tmp_path / "ended").exists()


def test_a_list_is_cut_without_a_word() -> None:
    listed = subprocess.Popen([*POPO, "configs"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert listed.stdout is not None and listed.stderr is not None
    listed.stdout.close()  # at once
    assert (listed.wait(timeout=60), listed.stderr.read()) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.7, 2.5, 5])
def test_control_c_while_it_loads(seconds: float, config: Path, tmp_path: Path) -> None:
    command = [*POPO, "fit", "--config", str(config), "--config", "method/popo", "--run.folder", str(tmp_path / "run")]
    started = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 130 and "Traceback" not in said
