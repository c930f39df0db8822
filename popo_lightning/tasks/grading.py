"""Verifier calls in processes of their own, under a time limit: model output is hostile input.

A process can be killed whatever it is doing, a thread cannot. It is no sandbox: a verifier that executes a response
gives that response this user's rights, and a child that leaves its process group survives the kill.

Requests go out as pickle. Replies come back as JSON and are checked again here, because a subverted grader writes them
and unpickling is code execution. The grader is started by `python -c` and not by multiprocessing, whose spawn imports
the parent's main module (and with it torch) into every worker.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from popo_lightning.tasks.base import Verify
from popo_lightning.tasks.grading_worker import LENGTH, MAX_REPLY_BYTES, checked_parts

logger = logging.getLogger(__name__)

MAX_RESPONSE_CHARS = 1_000_000
START_SECONDS = 30.0
START_ATTEMPTS = 3
_BOOT = """
import json, sys
boot = json.loads(sys.argv[1])
sys.path[:] = boot["path"]  # so that whatever the parent can import, its grader can
from popo_lightning.tasks.grading_worker import serve
serve(boot["fd"], boot["parent"])
"""


@dataclass(frozen=True)
class Grade:
    """What one response earned.

    Args:
        parts: Reward parts, always with "score" and "acc"; exactly these two, both 0, where grading failed.
        failure: None, or why there is no grade: "timeout", "crash" (the process died), "error" (the verifier raised),
            "invalid" (no dict of finite numbers with a "score", a reply over 64 KiB, or a response over the cap).
    """

    parts: dict[str, float]
    failure: str | None = None


class GradingPool:
    """Persistent grading processes, started by the first `grade`.

    A response that hangs, crashes or confuses its grader gets a failed `Grade`; its process group is killed and
    replaced, and every other response keeps its grade. For one caller at a time, in the process that made the pool.
    On Linux a worker also dies with the *thread* that started it, so call `grade` from one that lives on.

    Args:
        verify: A picklable function or object that a fresh interpreter can import: not from a script's `__main__`,
            no lambda.
        workers: Number of processes.
        seconds_per_response: Wall-clock limit in seconds, counted from when that response is handed to a worker.

    Raises:
        ValueError: `workers` below 1, or `seconds_per_response` not positive and finite.
    """

    def __init__(self, verify: Verify, workers: int = 1, seconds_per_response: float = 5.0) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        if not (seconds_per_response > 0 and math.isfinite(seconds_per_response)):
            raise ValueError(f"seconds_per_response must be positive and finite, not {seconds_per_response}")
        self._verify = pickle.dumps(verify)
        self._count = workers
        self._seconds = seconds_per_response
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._warned = False
        self._close = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def grade(self, items: Sequence[tuple[Any, str]]) -> list[Grade]:
        """Grade (gold answer, response text) pairs; the grades come in the order of the items.

        Raises:
            RuntimeError: The verifier cannot be imported by a worker, workers die or stall (30 s) three times in a
                row before they are ready, or the pool is closed.
            Exception: Whatever pickle raises for a gold answer that it cannot pickle; nothing has been graded then.
        """
        if not self._close.alive:
            raise RuntimeError("this grading pool is closed")
        grades: dict[int, Grade] = {}
        queue: deque[tuple[int, bytes]] = deque()
        for index, (gold, text) in enumerate(items):
            if len(text) > MAX_RESPONSE_CHARS:
                grades[index] = _failed("invalid")
            else:
                queue.append((index, pickle.dumps((index, pickle.dumps((gold, text))))))
        if queue:
            try:
                self._run(queue, grades)
            finally:  # an interrupt leaves workers with an item that nobody waits for
                for worker in [worker for worker in self._workers if worker.item is not None]:
                    self._discard(worker)
        return [grades[index] for index in range(len(items))]

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        self._close()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self, queue: deque[tuple[int, bytes]], grades: dict[int, Grade]) -> None:
        self._refill()
        self._receive(0.0, grades)  # a worker that died since the last call must not be given an item
        while queue or any(worker.item is not None for worker in self._workers):
            self._refill()
            for worker in self._workers:
                if queue and worker.ready and worker.item is None:
                    worker.start_item(*queue.popleft(), self._seconds)
            self._receive(min(worker.deadline for worker in self._workers) - time.monotonic(), grades)
            # Replies are read before deadlines are judged: a parent that was held up must not fail a grade it has.
            for worker in list(self._workers):
                if time.monotonic() >= worker.deadline:
                    self._lose(worker, grades)
        self._refill()

    def _refill(self) -> None:
        while len(self._workers) < self._count:
            self._workers.append(_Worker(self._verify))

    def _receive(self, seconds: float, grades: dict[int, Grade]) -> None:
        for worker in _wait(self._workers, seconds):
            try:
                reply = worker.exchange()
                if reply is None:
                    continue
                if not worker.ready:
                    self._welcome(worker, reply)
                else:
                    index, grade = worker.finish_item(reply)
                    grades[index] = grade
                    if grade.failure == "error":
                        self._warn(reply)
            except (EOFError, _ProtocolError) as error:
                self._lose(worker, grades, "crash" if isinstance(error, EOFError) else "invalid")

    def _welcome(self, worker: _Worker, reply: dict[str, Any]) -> None:
        if reply.get("ready") is not True:
            self._discard(worker)
            raise RuntimeError(f"a grading process cannot load the verifier: {str(reply.get('reason'))[:1000]}")
        worker.ready, worker.deadline = True, math.inf
        self._failed_starts = 0

    def _lose(self, worker: _Worker, grades: dict[int, Grade], failure: str | None = None) -> None:
        """Kill a worker and fail its item. `failure` is None at a deadline."""
        status = self._discard(worker)
        if worker.item is not None:
            # At a deadline the process may be long dead with the socket kept open by its child: that is a crash.
            grades[worker.item] = _failed(failure or ("timeout" if status == -signal.SIGKILL else "crash"))
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= START_ATTEMPTS:
                self._failed_starts = 0
                what = f"died (status {status}) or took over {START_SECONDS:g} s while loading the verifier"
                raise RuntimeError(f"{START_ATTEMPTS} grading processes in a row {what}; see their standard error")

    def _discard(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()

    def _warn(self, reply: dict[str, Any]) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING  # once, for a bug in the verifier itself
        logger.log(level, "the verifier raised %r; that response gets 0", str(reply.get("reason"))[:300])
        self._warned = True


class _ProtocolError(Exception):
    """A worker wrote what `serve` never writes: it is subverted or confused."""


class _Worker:
    """One grading process, the socket to it, and the item it works on."""

    def __init__(self, verify: bytes) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            boot = json.dumps({"path": sys.path, "fd": theirs.fileno(), "parent": os.getpid()})
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            command = [sys.executable, "-c", _BOOT, boot]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True, **pipes)
        self.socket.setblocking(False)
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._inbox = bytearray()
        self.outbox = memoryview(LENGTH.pack(len(verify)) + verify)
        self._flush()

    def start_item(self, index: int, request: bytes, seconds: float) -> None:
        self.item = index
        self.deadline = time.monotonic() + seconds
        self.outbox = memoryview(LENGTH.pack(len(request)) + request)
        self._flush()

    def finish_item(self, reply: dict[str, Any]) -> tuple[int, Grade]:
        index = self.item
        if index is None or reply.get("item") != index:
            raise _ProtocolError
        if reply.get("failure") in ("error", "invalid"):
            grade = _failed(reply["failure"])
        else:
            parts = checked_parts(reply.get("parts"))
            if parts is None:
                raise _ProtocolError
            grade = Grade(parts)
        self.item, self.deadline = None, math.inf
        return index, grade

    def exchange(self) -> dict[str, Any] | None:
        """Write and read what the socket takes and has. The reply once it is whole; EOFError at the end of file."""
        self._flush()
        try:
            data = self.socket.recv(MAX_REPLY_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._inbox += data
        if len(self._inbox) < LENGTH.size:
            return None
        message = self._inbox[LENGTH.size :]
        (size,) = LENGTH.unpack_from(self._inbox)
        if size > MAX_REPLY_BYTES or len(message) > size:  # there are never two replies at once
            raise _ProtocolError
        if len(message) < size:
            return None
        self._inbox.clear()
        try:
            reply = json.loads(message)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise _ProtocolError
        return reply

    def kill(self) -> int:
        """Kill the process group and return the exit status (that of an earlier death, where there was one)."""
        self.socket.close()
        if self._process.returncode is None:  # not reaped, so the number is still this process's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _flush(self) -> None:
        try:
            while self.outbox:
                self.outbox = self.outbox[self.socket.send(self.outbox) :]
        except BlockingIOError:
            pass
        except OSError:  # the worker is gone, which the next read reports
            self.outbox = memoryview(b"")


def _wait(workers: Sequence[_Worker], seconds: float) -> list[_Worker]:
    """The workers with something to read or room to write, waiting at most so long for the first."""
    poll = select.poll()
    for worker in workers:
        poll.register(worker.socket, select.POLLIN | (select.POLLOUT if worker.outbox else 0))
    ready = {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}
    return [worker for worker in workers if worker.socket.fileno() in ready]


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the parent (a data loader's worker) must not end them
        while workers:
            workers.pop().kill()


def _failed(failure: str) -> Grade:
    return Grade({"score": 0.0, "acc": 0.0}, failure)
