"""Runs are processes of their own, one at a time, which can be stopped, resumed and failed by themselves."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from popo_lightning.compare.plan import SUMMARY, PlannedRun, is_finished, write_record
from popo_lightning.errors import SettingError

LOCK = "lock"
LOG = "log.txt"
TAIL_LINES, TAIL_BYTES = 15, 32_000
PATIENCE = 15.0  # seconds for a run that is asked to stop

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        run: Which one.
        state: "elsewhere" is under way in another process.
        seconds: It took here.
        reason: Of a failure; the end of the log.
    """

    run: PlannedRun
    state: Literal["finished", "failed", "elsewhere"]
    seconds: float = 0.0
    reason: str = ""


def run_all(runs: Sequence[PlannedRun], say: Say, accuracy: Callable[[PlannedRun], str]) -> list[Outcome]:
    """Makes the runs that are not finished, one after the other.

    Args:
        runs: In order.
        say: Prints a line.
        accuracy: Of a finished run, for its line.

    Returns:
        What became of those that were not finished before.

    Raises:
        SettingError: A folder holds another run; nothing has begun then.
        KeyboardInterrupt: Stopped; so is the run that was under way.
    """
    to_do = [run for run in runs if not is_finished(run)]
    say(f"{len(runs)} runs: {len(runs) - len(to_do)} finished before, {len(to_do)} to do")
    outcomes: list[Outcome] = []
    with _stopped_by_signals():
        for number, run in enumerate(to_do, 1):
            place = f"[{number} of {len(to_do)}] {run.label}"
            say(f"{place}: {'resumed' if (run.folder / LOG).exists() else 'started'}, log in {run.folder / LOG}")
            outcome = make(run)
            outcomes.append(outcome)
            say(f"{place}: {_ending(outcome, accuracy)}{_time_left(outcomes, len(to_do) - number)}")
            if outcome.reason:
                say(f"  {outcome.reason}")
    return outcomes


def make(run: PlannedRun) -> Outcome:
    """Makes one run, unless another process does or has just done so."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.folder) as lock:
        if lock is None:
            return Outcome(run, "elsewhere")
        try:
            if is_finished(run):
                return Outcome(run, "finished")
        except SettingError as error:  # another process began it with other settings since all were looked at
            return Outcome(run, "failed", reason=str(error))
        write_record(run)
        began = time.perf_counter()
        code = launch(run, lock)
        seconds = time.perf_counter() - began
    if code == 0 and (run.folder / SUMMARY).exists():
        return Outcome(run, "finished", seconds)
    ended = f"ended with exit code {code}" if code else f"ended without a {SUMMARY}"
    return Outcome(run, "failed", seconds, f"{ended}; the end of {run.folder / LOG}:\n{tail(run.folder / LOG)}")


@contextmanager
def locked(folder: Path) -> Iterator[IO[bytes] | None]:
    """Holds the run's lock, or gives None where another process does.

    The kernel lets go of it when the last process that has the file open ends, however it ends. The run's own process
    inherits it: one that outlives a killed popo compare is not begun a second time beside itself.
    """
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def launch(run: PlannedRun, lock: IO[bytes]) -> int:
    """Starts the process, waits for it, and returns its exit code. An interruption stops it first."""
    with (run.folder / LOG).open("ab") as log:
        log.write(f"$ {shlex.join(run.command())}\n".encode())
        log.flush()
        process = subprocess.Popen(
            run.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            process_group=0,  # Ctrl-C reaches only us, and we stop it together with its graders
        )
        try:
            return process.wait()
        except BaseException:
            _stop(process)
            raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks politely first: a checkpoint being written is worth a moment."""
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, request)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                continue


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """A terminal that closes and a polite kill are Ctrl-C: without this the run under way would go on alone."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays nohup
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def tail(path: Path) -> str:
    """The last lines of a log, without what would move a cursor."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]
    return "\n".join("    " + "".join(c if c.isprintable() else " " for c in line)[:300] for line in lines)


def _ending(outcome: Outcome, accuracy: Callable[[PlannedRun], str]) -> str:
    if outcome.state == "elsewhere":
        return "under way in another process, left to it"
    if outcome.state == "failed":
        return f"failed after {outcome.seconds:.0f} s"
    return f"{outcome.seconds:.0f} s, {accuracy(outcome.run)}"


def _time_left(outcomes: Sequence[Outcome], left: int) -> str:
    """A guess from the runs made here."""
    seconds = [outcome.seconds for outcome in outcomes if outcome.state == "finished" and outcome.seconds]
    if not left or not seconds:
        return ""
    return f"; about {max(1, round(left * sum(seconds) / len(seconds) / 60))} min left"
