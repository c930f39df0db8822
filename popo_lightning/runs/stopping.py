"""Ctrl-C and SIGTERM: the first stops a run where it can be resumed, the second stops it at once."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L

from popo_lightning.core.ranks import all_reduce
from popo_lightning.core.run_data import data_module
from popo_lightning.runs.continue_command import continue_command, without_options

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_REQUEST = 1.0  # seconds: a terminal and a launcher may both pass on one Ctrl-C


class Stopped(BaseException):
    """Raised at a resumable point of a run that was asked to stop. Not an Exception, so that no handler swallows it.

    Args:
        number: The signal number.

    Attributes:
        checkpoint: The checkpoint to resume from; None if there is none.
        where: The last point the checkpoint contains, in words.
        unusable: Why training cannot resume from what is saved, as a clause; "" if it can.
        began_from: Checkpoint of another run that this run began from, or None.
        folder: Folder of the run.
        launched: Whether another rank started this process and waits for it.
        speaks: Whether this rank prints the message.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.checkpoint: str | None = None
        self.where = ""
        self.unusable = ""
        self.began_from: str | None = None
        self.folder: str | None = None
        self.launched = False
        self.speaks = True
        super().__init__(self.name)

    @property
    def name(self) -> str:
        """Name of the signal."""
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """Exit code by the convention of shells."""
        return 128 + self.number


class StopRequests:
    """What signals ask of this process and of the other ranks.

    A handler only records the signal. The run reads the record at resumable points, on all ranks together. On a single
    rank, generation is interrupted at once.

    Attributes:
        asked: Number of the signal, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._armed = False
        self._open = False
        self._before: dict[int, Any] = {}
        self._watch: _Watch | None = None

    def arm(
        self, signals: tuple[int, ...] = SIGNALS, say: bool = True, at_once: Callable[[], None] = lambda: None
    ) -> None:
        """Takes the signals over, except ignored ones (nohup). Only the main thread can.

        Args:
            signals: Numbers of the signals.
            say: Whether to answer the first signal on standard error.
            at_once: Function that is called before a second signal ends the process.
        """
        self.asked, self._armed = None, True
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        heeded = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        self._watch = _Watch(heeded, say, at_once)

    def disarm(self) -> None:
        """Restores the earlier handlers."""
        self._armed = self._open = False
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def _note(self, number: int, frame: Any) -> None:
        self.asked = self.asked or number
        if self._open:
            self._open = False
            raise Stopped(self.asked)

    def leave_at_once(self) -> None:
        """Lets the next signal interrupt the present work, until :meth:`disarm`."""
        self._open = True

    def check(self, trainer: L.Trainer) -> None:
        """Stops all ranks if any was asked to. A collective.

        Raises:
            Stopped: On all ranks.
        """
        if self._armed and (asked := int(all_reduce(trainer, self.asked or 0, "max"))):
            raise Stopped(asked)

    @contextmanager
    def interruptible(self, alone: bool = True) -> Iterator[None]:
        """Lets a signal leave the block at once, which must not change weights or what a checkpoint has from before it.

        Args:
            alone: Whether there is no other rank that would wait for this one; otherwise the block is not left.
        """
        try:
            self._open = self._armed and alone
            if self._open and self.asked:
                raise Stopped(self.asked)
            yield
        finally:
            self._open = False


def stop_requests(trainer: L.Trainer) -> StopRequests:
    """The requests that a trainer's data module keeps."""
    found: StopRequests = data_module(trainer).stopping  # type: ignore[attr-defined]
    return found


class _Watch:
    """Receives signals in a thread of its own while the main thread waits for something outside Python."""

    def __init__(self, signals: list[int], say: bool, at_once: Callable[[], None]) -> None:
        self._signals, self._say, self._at_once = signals, say, at_once
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        signal.set_wakeup_fd(self._before)
        os.close(self._writes)

    def _listen(self) -> None:
        first: float | None = None
        while heard := os.read(self._reads, 64):
            for number in heard:
                if number not in self._signals:
                    continue
                if first is None:
                    first = time.monotonic()
                    self._answer(number)
                elif time.monotonic() - first > SAME_REQUEST:
                    self._end(number)
        os.close(self._reads)

    def _answer(self, number: int) -> None:
        if self._say:
            name = signal.Signals(number).name
            _print(f"popo: {name}: stopping between two steps; a second signal stops at once")

    def _end(self, number: int) -> None:
        self._at_once()
        for child in multiprocessing.active_children():
            child.kill()
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        _print(f"{show_cursor}popo: stopped at once by {signal.Signals(number).name}, without a new checkpoint")
        os._exit(128 + number)


def _print(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # print may wait for a lock that the main thread holds


def stopped_in_words(stop: Stopped, args: Any) -> str:
    """Says where a run was stopped, and which command continues it.

    Args:
        stop: The stop, with the checkpoint if there is one.
        args: Arguments of the stopped command.
    """
    if stop.folder is None or not isinstance(args, Sequence) or "fit" not in args:
        return f"stopped by {stop.name}"
    after = f" after {stop.where}" if stop.where else ""
    if stop.unusable:
        kept = without_options(args, "--run.folder", "--run.resume")
        command = shlex.join(["popo", *kept, "--run.folder", "null", "--run.resume", "false"])
        return f"stopped by {stop.name}{after}; {stop.unusable}; start again, in a folder of its own, by: {command}"
    unsaved = stop.checkpoint in (None, stop.began_from)  # nothing in the run's own folder says what it began from
    command = shlex.join(["popo", *continue_command(args, stop.folder, stop.began_from if unsaved else None)])
    if stop.checkpoint is None:
        return f"stopped by {stop.name} before anything was saved; start again by: {command}"
    saved = f"{after}, which {stop.checkpoint} holds" if after else f"; {stop.checkpoint} is the newest checkpoint"
    return f"stopped by {stop.name}{saved}; continue by: {command}"


def too_late_in_words(requests: StopRequests) -> str | None:
    """Says that a signal came too late to stop anything; None if none came.

    Args:
        requests: Requests to a finished run.
    """
    if requests.asked is None:
        return None
    return f"{signal.Signals(requests.asked).name} came when the run was at its end; nothing is left to do"
