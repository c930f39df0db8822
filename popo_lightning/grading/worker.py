"""The child's side of `popo_lightning.grading.pool`: a process that calls the verifier and writes replies.

Standard library only, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import reprlib
import resource
import signal
import socket
import struct
import sys
import sysconfig
from numbers import Real
from pathlib import Path
from traceback import walk_tb
from typing import Any

from popo_lightning.core.bounds import MAX_FLOAT32
from popo_lightning.core.metric_names import RULE, is_part
from popo_lightning.core.scalars import plain_scalar
from popo_lightning.core.task import Verify

LENGTH = struct.Struct("!I")
"""Precedes every message in both directions, with the message's length in bytes."""

LIBRARIES = (
    Path(__file__).parent.parent,
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
"""Folders whose errors the user cannot correct."""

MAX_REPLY_BYTES = 64 * 1024

SHOWN = 200
"""Maximum characters of a response that the log shows with its failure."""

MAX_MEMORY_BYTES = 4 * 1024**3
"""Memory that one grader may allocate. A response that needs more is an error or a crash of its own grader."""


def checked_parts(parts: object) -> dict[str, float] | None:
    """The reward components as floats that float32 holds, with "acc" from "score" if missing; None if invalid."""
    if not isinstance(parts, dict) or "score" not in parts:
        return None
    checked: dict[str, float] = {}
    for name, value in parts.items():
        if not isinstance(name, str) or not is_part(name) or not isinstance(value, Real):
            return None
        try:
            checked[name] = float(value)
        except OverflowError:
            return None
        if not abs(checked[name]) <= MAX_FLOAT32:  # nan is not either
            return None
    checked.setdefault("acc", checked["score"])
    return checked


def serve(fd: int, parent: int) -> None:
    """Loads the verifier from the first message, then answers every further one until the parent is gone.

    Args:
        fd: File descriptor of the socket to the parent.
        parent: Process id of the parent.
    """
    _die_with(parent)
    _limit_memory()
    channel = socket.socket(fileno=fd)
    channel.set_inheritable(False)  # a program that the verifier starts must not keep the socket open
    try:
        verify = pickle.loads(_receive(channel))
    except BaseException as error:
        _send(channel, {"ready": False, "reason": _describe(error)})
        return
    # Start-up errors reach the parent's standard error; what a hostile response makes the grader print must not.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _send(channel, {"ready": True})
    pid = os.getpid()
    while True:
        item, body = pickle.loads(_receive(channel))
        reply = _graded(verify, body)
        if os.getpid() != pid:  # the verifier forked, and both copies returned
            os._exit(0)
        _send(channel, {"item": item, **reply})


def _graded(verify: Verify, body: bytes) -> dict[str, Any]:
    text = ""
    try:
        answer, text = pickle.loads(body)
        given = verify(answer, text)
        parts = checked_parts(_plain(given))
        if parts is not None and len(json.dumps(parts)) < MAX_REPLY_BYTES - 100:  # room for the item's number
            return {"parts": parts}
        return {"failure": "invalid", "reason": f"{_invalid(given)} for {shown(text)}"}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        return {"failure": "error", "reason": f"raised {_describe(error)}{_place(error)} for {shown(text)}"}
    finally:
        signal.alarm(0)  # an alarm that remains would hit a later response


def _plain(given: Any) -> Any:
    """A verifier's result, with a bare number as the score and numpy's and torch's scalars as Python numbers."""
    if not isinstance(given, dict):
        number = plain_scalar(given)
        return {"score": number} if isinstance(number, Real) else given
    return {name: plain_scalar(value) for name, value in given.items()}


def _invalid(given: Any) -> str:
    """What is wrong with a verifier's result, after "the verifier"."""
    names = [name for name in given if isinstance(name, str) and not is_part(name)] if isinstance(given, dict) else []
    if names:
        return f"named a component {reprlib.repr(names[0])}, where a name has {RULE},"
    return f"returned {reprlib.repr(given)[:300]}"


def shown(text: object) -> str:
    """Quotes the end of a response, where its answer is."""
    if not isinstance(text, str):
        return "a response that is no text"
    return f"the response {text!r}" if len(text) <= SHOWN else f"the response that ends in {text[-SHOWN:]!r}"


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:1000]
    except BaseException:  # the exception may be a class of the verifier's
        return "an exception that cannot be printed"


def _place(error: BaseException) -> str:
    """File and line in the user's own code where an error arose, if any."""
    try:
        files = [(Path(frame.f_code.co_filename), line) for frame, line in walk_tb(error.__traceback__)]
        own = [(file, line) for file, line in files if not any(file.is_relative_to(folder) for folder in LIBRARIES)]
        return f" at {own[-1][0].name}:{own[-1][1]}" if own else ""
    except BaseException:
        return ""


def _die_with(parent: int) -> None:
    """Makes the process die with its parent, even after kill -9 or in a loop in C, and first when memory runs out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:  # the parent died before the line above
        sys.exit(0)


def _limit_memory() -> None:
    """Limits what the process allocates, not what it maps: libraries map far more than they use. No core dumps."""
    for limit, most in ((resource.RLIMIT_DATA, MAX_MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):  # a system that has no such limit
            resource.setrlimit(limit, (most, hard))


def _receive(channel: socket.socket) -> bytes:
    (size,) = LENGTH.unpack(_receive_exactly(channel, LENGTH.size))
    return _receive_exactly(channel, size)


def _receive_exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:  # closed: the pool is gone
            sys.exit(0)
        data += piece
    return bytes(data)


def _send(channel: socket.socket, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode()
    channel.sendall(LENGTH.pack(len(data)) + data)
