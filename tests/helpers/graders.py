"""Verifiers for test_grading.py, well-behaved and hostile. Grading processes import them: standard library only."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def exact(gold: Any, text: str) -> dict[str, float]:
    return {"score": float(text == gold)}


def worker_pid(gold: Any, text: str) -> dict[str, float]:
    return {"score": 1.0, "pid": os.getpid()}


def misbehave(gold: Any, text: str) -> Any:
    """Does what `text` names, with `gold` as its argument. Any other text is graded by its length."""
    deed = _DEEDS.get(text)
    return deed(gold) if deed else {"score": len(text), "acc": text == gold, "pid": os.getpid()}


def _loop(gold: Any) -> None:
    while True:
        pass


def _loop_in_c(gold: Any) -> None:
    """Never returns to the interpreter, so that no Python-level alarm or thread can run."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(7))
    signal.alarm(1)
    sum(itertools.repeat(0))


def _ignore_signals(gold: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)


def _leave_alarm(gold: Any) -> dict[str, float]:
    signal.alarm(1)
    return {"score": 1.0}


def _nap(gold: Any) -> dict[str, float]:
    time.sleep(gold)
    return {"score": 1.0}


def _print(gold: Any) -> dict[str, float]:
    print("\x00\x00\x00\x05hello", flush=True)
    os.write(1, b"\x00" * 100_000)
    os.write(2, b"noise on standard error\n")
    return {"score": 1.0}


def _note(path: str, pid: int) -> None:
    new = Path(path + ".new")
    new.write_text(str(pid))
    new.rename(path)


def _fork(gold: str) -> int:
    """Forks a child that sleeps and keeps the socket to the parent open."""
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    _note(gold, child)
    return child


def _fork_and_loop(gold: str) -> None:
    _fork(gold)
    _loop(gold)


def _fork_and_die(gold: str) -> None:
    _fork(gold)
    os._exit(3)


def _fork_and_return_twice(gold: Any) -> dict[str, float]:
    os.fork()
    return {"score": 1.0}


def _note_and_loop(gold: str) -> None:
    _note(gold, os.getpid())
    _loop_in_c(gold)


def _run_program_and_die(gold: Any) -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], close_fds=False)
    os._exit(3)


def _forge(gold: bytes) -> None:
    """Writes a reply of our choice to the parent, as a subverted grader can."""
    for fd in range(3, 100):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, gold)
        except OSError:
            continue
    time.sleep(1000)


def framed(message: bytes) -> bytes:
    return struct.pack("!I", len(message)) + message


def forged(reply: object) -> bytes:
    return framed(json.dumps(reply).encode())


def _raise_unprintable(gold: Any) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError

    raise Unprintable


def _exit_politely(gold: Any) -> None:
    sys.exit(0)


def _close_everything(gold: Any) -> None:
    os.closerange(0, 1000)


def _recurse(gold: Any) -> None:
    _recurse(gold)


_DEEDS: dict[str, Callable[[Any], Any]] = {
    "loop": _loop,
    "loop in c": _loop_in_c,
    "ignore signals": _ignore_signals,
    "leave alarm": _leave_alarm,
    "nap": _nap,
    "os._exit": lambda gold: os._exit(0),
    "segfault": lambda gold: os.kill(os.getpid(), signal.SIGSEGV),
    "close everything": _close_everything,
    "raise": lambda gold: 1 / 0,
    "raise unprintable": _raise_unprintable,
    "sys.exit": _exit_politely,
    "recurse": _recurse,
    "return": lambda gold: gold,
    "print": _print,
    "fork and loop": _fork_and_loop,
    "fork and die": _fork_and_die,
    "fork and return twice": _fork_and_return_twice,
    "note and loop": _note_and_loop,
    "run a program and die": _run_program_and_die,
    "forge": _forge,
}


class RefusesToLoad:
    """Can be pickled in the parent, but fails to load in the grading process."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, gold: Any, text: str) -> dict[str, float]:
        return {"score": 1.0}

    def __setstate__(self, state: dict[str, str]) -> None:
        if state["how"] == "exit":
            os._exit(4)
        raise ImportError("no such library")


class FailsOn:
    """Raises on some ranks, whose environment a grader inherits. Elsewhere it grades by the number of characters."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks

    def __call__(self, gold: Any, text: str) -> dict[str, float]:
        if int(os.environ.get("RANK", "0")) in self.ranks:
            raise KeyError("solution")
        return {"score": float(len(text) % 2)}


class LoadsSlowly:
    """Takes longer to load than a response may take."""

    def __call__(self, gold: Any, text: str) -> dict[str, float]:
        return {"score": 1.0}

    def __getstate__(self) -> dict[str, int]:
        return {"loads": 1}

    def __setstate__(self, state: dict[str, int]) -> None:
        time.sleep(0.6)


class BreaksOnArrival:
    """Is a gold answer that cannot be unpickled."""

    def __reduce__(self) -> Any:
        return (int, ("not a number",))


def score_begun(answer: Any, text: str) -> dict[str, float]:
    """Returns 1 if the text begins as it should."""
    return {"score": float(text.startswith(answer)), "acc": float(text.startswith(answer))}
