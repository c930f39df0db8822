"""The parent's side of one grading process: the socket to it and the items it was given."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from popo_lightning.grading.worker import LENGTH, MAX_REPLY_BYTES, checked_parts

_BOOT = """
import json, sys
boot = json.loads(sys.argv[1])
sys.path[:] = boot["path"]  # so that the grader can import everything its parent can
from popo_lightning.grading.worker import serve
serve(boot["fd"], boot["parent"])
"""


@dataclass(frozen=True)
class Grade:
    """The grade of one response.

    Args:
        parts: Reward components, always with "score" and "acc"; exactly these two, both 0, if grading failed.
        failure: None, or why there is no grade: "timeout", "crash" (the process died), "error" (the verifier raised),
            "invalid" (neither a number nor a dict of plainly named numbers with a "score", a number that float32 does
            not hold, a reply over 64 KiB, or a response over the cap).
    """

    parts: dict[str, float]
    failure: str | None = None


def failed(failure: str) -> Grade:
    """A grade with reward 0 and the reason."""
    return Grade({"score": 0.0, "acc": 0.0}, failure)


class ProtocolError(Exception):
    """A worker wrote what `serve` never writes, so it is subverted or confused."""


class GradingProcess:
    """One grading process, the socket to it, and the item it works on.

    Args:
        verify: The pickled verifier.

    Attributes:
        ready: Whether the process has loaded the verifier.
        item: Index of the item that the process works on, or None.
        deadline: Deadline of the reply, in seconds on the monotonic clock.
    """

    start_seconds = 30.0

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
        self.deadline = time.monotonic() + self.start_seconds
        self._inbox = bytearray()
        self.outbox = memoryview(LENGTH.pack(len(verify)) + verify)
        self._flush()

    def start_item(self, index: int, request: bytes, seconds: float) -> None:
        """Sends the process an item."""
        self.item = index
        self.deadline = time.monotonic() + seconds
        self.outbox = memoryview(LENGTH.pack(len(request)) + request)
        self._flush()

    def finish_item(self, reply: dict[str, Any]) -> tuple[int, Grade]:
        """Returns index and grade of the item. Raises ProtocolError for a reply that `serve` would not write."""
        index = self.item
        if index is None or reply.get("item") != index:
            raise ProtocolError
        if reply.get("failure") in ("error", "invalid"):
            grade = failed(reply["failure"])
        else:
            parts = checked_parts(reply.get("parts"))
            if parts is None:
                raise ProtocolError
            grade = Grade(parts)
        self.item, self.deadline = None, math.inf
        return index, grade

    def exchange(self) -> dict[str, Any] | None:
        """Writes and reads what the socket allows; returns a complete reply, else None. EOFError at the end of file."""
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
            raise ProtocolError
        if len(message) < size:
            return None
        self._inbox.clear()
        try:
            reply = json.loads(message)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise ProtocolError
        return reply

    def kill(self) -> int:
        """Kills the process group and returns the exit status, that of an earlier death if there was one."""
        self.socket.close()
        if self._process.returncode is None:  # not reaped, so the process id is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _flush(self) -> None:
        try:
            while self.outbox:
                self.outbox = self.outbox[self.socket.send(self.outbox) :]
        except BlockingIOError:
            pass
        except OSError:  # the worker is gone; the next read reports it
            self.outbox = memoryview(b"")


def ready_processes(workers: Sequence[GradingProcess], seconds: float) -> list[GradingProcess]:
    """The workers with something to read or room to write; waits at most `seconds` for the first."""
    poll = select.poll()
    for worker in workers:
        poll.register(worker.socket, select.POLLIN | (select.POLLOUT if worker.outbox else 0))
    ready = {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}
    return [worker for worker in workers if worker.socket.fileno() in ready]
