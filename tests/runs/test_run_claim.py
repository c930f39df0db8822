"""A folder belongs to one process at a time, and to no dead process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import environment

from popo_lightning.core.errors import SettingError
from popo_lightning.runs.claim import LOCK, check_writable, claim, holder, is_claimed

HOLD = """
import os, sys, time
from contextlib import ExitStack
from pathlib import Path
from popo_lightning.runs.claim import claim
claims = ExitStack()
taken = claim(Path(sys.argv[1]), "run.folder", claims)
if len(sys.argv) > 2 and os.fork() == 0:
    os.close(1)
    time.sleep(60)  # an engine that outlives its run
print("taken" if taken else "refused", flush=True)
time.sleep(60)
"""


def holding(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Starts a process that tries to take the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *more],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stdout is not None
    process.said = process.stdout.readline().strip()  # type: ignore[attr-defined]
    return process


def end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    first = holding(folder)
    try:
        assert first.said == "taken"  # type: ignore[attr-defined]
        assert not claim(folder, "run.folder", ExitStack())
        assert f"process {first.pid} on " in holder(folder)
        assert is_claimed(folder)
    finally:
        end(first)
    assert not is_claimed(folder) and not is_claimed(tmp_path) and not (tmp_path / LOCK).exists()
    with ExitStack() as claims:
        assert claim(folder, "run.folder", claims)  # a dead process holds nothing
        assert f"process {os.getpid()} on " in holder(folder)
        assert not claim(folder, "run.folder", claims)  # nor does this process take it twice
    with ExitStack() as claims:
        assert claim(folder, "run.folder", claims)
    assert not is_claimed(folder)


def test_many_at_once_and_one_gets_it(tmp_path: Path) -> None:
    processes = [holding(tmp_path / "run") for _ in range(3)]
    try:
        assert sorted(process.said for process in processes) == ["refused", "refused", "taken"]  # type: ignore[attr-defined]
    finally:
        for process in processes:
            end(process)


def test_a_child_that_outlives_the_run_keeps_nothing(tmp_path: Path) -> None:
    run = holding(tmp_path, "fork")
    try:
        run.kill()  # only the run
        run.wait()
        time.sleep(0.05)
        with ExitStack() as claims:
            assert claim(tmp_path, "run.folder", claims)
    finally:
        os.killpg(run.pid, signal.SIGKILL)


def test_a_folder_that_nothing_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(SettingError, match=f"run.folder is '{folder}', where nothing can be written"):
            claim(folder, "run.folder", ExitStack())

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(SettingError, match=r"checkpoint\.dirpath is .*Read-only file system"):
        check_writable(tmp_path, "checkpoint.dirpath")
    assert not (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    with ExitStack() as claims:
        assert claim(tmp_path, "run.folder", claims) and "has no locks" in caplog.text
        assert not is_claimed(tmp_path)
