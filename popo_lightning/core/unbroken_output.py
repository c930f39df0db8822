"""Keeps a command running whose reader is gone: `popo fit | tee log` with tee killed, `popo configs | head`."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, BinaryIO, TextIO, cast


class UnbrokenFile(io.FileIO):
    """A file for writing that becomes /dev/null when the pipe behind it has no reader any more."""

    def write(self, data: Any, /) -> int:
        """Writes like FileIO, and drops the data if nobody reads."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also for processes that inherit it
            os.close(nowhere)
            return memoryview(data).nbytes


def keep_output_unbroken() -> None:
    """Replaces stdout and stderr of this process by streams that a missing reader does not break."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # None without a terminal; others belong to whoever made them
            stream.flush()
            raw = UnbrokenFile(stream.fileno(), "w", closefd=False)
            buffered = isinstance(stream.buffer, io.BufferedWriter)  # not with PYTHONUNBUFFERED
            again = io.TextIOWrapper(
                cast(BinaryIO, io.BufferedWriter(raw) if buffered else raw),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, again)
