"""Runs as separate processes, one or several at a time, that stop, resume and fail independently."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from popo_lightning.cli.compare.plan import SUMMARY, PlannedRun, is_finished, write_record
from popo_lightning.core.errors import SettingError

LOCK = "lock"
LOG = "log.txt"
TAIL_LINES, TAIL_BYTES = 15, 32_000
PATIENCE = 15.0  # seconds to wait after each request to stop
POLL = 0.05  # seconds between checks of the runs in progress

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Args:
        run: The run.
        state: State of the run; "elsewhere" means that another process is running it.
        seconds: Seconds that the run took here, beside the runs in progress at the same time.
        reason: Reason of a failure: the end of the log.
    """

    run: PlannedRun
    state: Literal["finished", "failed", "elsewhere"]
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class UnderWay:
    """A run whose process has started.

    Args:
        run: The run.
        process: Process of the run, which leads its own process group.
        held: Lock on the folder of the run.
        place: Position of its output line.
        began: Start time on the clock of time.perf_counter.
    """

    run: PlannedRun
    process: subprocess.Popen[bytes]
    held: ExitStack
    place: str
    began: float

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.began


def run_all(
    runs: Sequence[PlannedRun],
    say: Say,
    accuracy: Callable[[PlannedRun], str],
    at_once: int = 1,
    seconds_per_run: float | None = None,
) -> list[Outcome]:
    """Runs the planned runs that are not finished.

    Args:
        runs: Runs in the order in which they begin.
        say: Prints a line.
        accuracy: Gives the accuracy of a finished run, for its line.
        at_once: Number of concurrent runs.
        seconds_per_run: Time limit; a run that exceeds it is stopped and counts as failed. None sets no limit.

    Returns:
        Outcomes of the runs that were not finished before, in the order in which they ended.

    Raises:
        SettingError: A folder holds another run; no run has begun.
        KeyboardInterrupt: A signal stopped this process, and with it the runs in progress.
    """
    to_do = [run for run in runs if not is_finished(run)]
    say(f"{len(runs)} runs: {len(runs) - len(to_do)} finished before, {len(to_do)} to do")
    waiting = [(run, f"[{number} of {len(to_do)}] {run.label}") for number, run in enumerate(to_do, 1)]
    under_way: list[UnderWay] = []
    outcomes: list[Outcome] = []

    def ended(place: str, outcome: Outcome) -> None:
        outcomes.append(outcome)
        left = _time_left(outcomes, len(to_do) - len(outcomes), at_once)
        say(f"{place}: {_ending(outcome, accuracy)}{left}")
        if outcome.reason:
            say(f"  {outcome.reason}")

    with _stopped_by_signals():
        try:
            while waiting or under_way:
                while waiting and len(under_way) < at_once:
                    run, place = waiting.pop(0)
                    log = run.folder / LOG
                    say(f"{place}: {'resumed' if log.exists() else 'started'}, log in {log}")
                    begun = begin(run, place)
                    if isinstance(begun, UnderWay):
                        under_way.append(begun)
                    else:
                        ended(place, begun)
                for one in under_way:
                    if seconds_per_run is not None and one.seconds > seconds_per_run:
                        stop([one.process])
                for one in [one for one in under_way if one.process.poll() is not None]:
                    under_way.remove(one)
                    ended(one.place, end(one, seconds_per_run))
                time.sleep(POLL)
        except BaseException:
            stop([one.process for one in under_way])
            for one in under_way:
                one.held.close()
            raise
    return outcomes


def begin(run: PlannedRun, place: str) -> UnderWay | Outcome:
    """Starts a run's process, unless another process makes it or has just made it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        lock = held.enter_context(locked(run.folder))
        if lock is None:
            return Outcome(run, "elsewhere")
        try:
            if is_finished(run):
                return Outcome(run, "finished")
        except SettingError as error:  # another process has begun it with other settings since the first check
            return Outcome(run, "failed", reason=str(error))
        write_record(run)
        began = time.perf_counter()
        return UnderWay(run, launch(run, lock), held.pop_all(), place, began)


def end(begun: UnderWay, seconds_per_run: float | None) -> Outcome:
    """Returns the outcome of a run whose process has ended, and releases its folder."""
    run, code, seconds = begun.run, begun.process.returncode, begun.seconds
    begun.held.close()
    if code == 0 and (run.folder / SUMMARY).exists():
        return Outcome(run, "finished", seconds)
    ended = f"ended with exit code {code}" if code else f"ended without a {SUMMARY}"
    if seconds_per_run is not None and seconds > seconds_per_run:
        ended = f"was stopped after seconds_per_run ({seconds_per_run:g} s)"
    return Outcome(run, "failed", seconds, f"{ended}; the end of {run.folder / LOG}:\n{tail(run.folder / LOG)}")


@contextmanager
def locked(folder: Path) -> Iterator[IO[bytes] | None]:
    """Holds the run's lock, or yields None if another process holds it.

    The kernel releases the lock when the last process with the open file ends, however it ends. The run's own process
    inherits the lock, so a run that outlives a killed popo compare is not started a second time.
    """
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def launch(run: PlannedRun, lock: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the run's process and writes its output to the run's log."""
    with (run.folder / LOG).open("ab") as log:
        log.write(f"$ {shlex.join(run.command())}\n".encode())
        log.flush()
        return subprocess.Popen(
            run.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            process_group=0,  # Ctrl-C reaches only this process, which stops the run together with its graders
        )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stops processes by ever stronger signals, with time between them to finish writing a checkpoint."""
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        running = [process for process in processes if process.poll() is None]
        for process in running:
            os.killpg(process.pid, request)
        until = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in running) and time.monotonic() < until:
            time.sleep(POLL)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Treats SIGTERM and SIGHUP like Ctrl-C; otherwise the present run would continue alone."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup keeps its effect
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def tail(path: Path) -> str:
    """The last lines of a log, without control characters."""
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


def _time_left(outcomes: Sequence[Outcome], left: int, at_once: int) -> str:
    """Estimates the time left from the runs made here; runs in progress count as not begun."""
    seconds = [outcome.seconds for outcome in outcomes if outcome.state == "finished" and outcome.seconds]
    if not left or not seconds:
        return ""
    return f"; about {max(1, round(left * sum(seconds) / len(seconds) / 60 / at_once))} min left"
