"""Calls verifiers in separate processes under a time limit, because model output is hostile input.

A process can be killed at any time, and a thread cannot. This is no sandbox: a verifier that executes a response
gives that response this user's rights, and a child that leaves its process group survives the kill.

Requests go out as pickle. Replies come back as JSON and are checked again here, because a subverted grader writes them
and unpickling is code execution. The grader is started by `python -c` and not by multiprocessing, whose spawn imports
the parent's main module (and with it torch) into every worker.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import time
import weakref
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.task import Verify
from popo_lightning.grading.process import Grade, GradingProcess, ProtocolError, failed, ready_processes
from popo_lightning.grading.worker import shown

logger = logging.getLogger(__name__)

MAX_RESPONSE_CHARS = 1_000_000
START_ATTEMPTS = 3

FAILURES = {
    "timeout": "took over {seconds:g} s ({limit}) for",
    "crash": "ended its process (status {status}) over",
    "invalid": "sent a reply that is no grade for",
}
"""Beginning of the message about a grader that did not report its failure itself; the response follows."""


class GradingPool:
    """Persistent grading processes, started by the first `grade`.

    A response that hangs, crashes or confuses its grader gets a failed `Grade`. Its process group is killed and
    replaced, and every other response keeps its grade. The pool serves one caller at a time, in the process that made
    the pool. On Linux a worker also dies with the *thread* that started it, so call `grade` from a long-lived thread.
    The log names the first failure, with the response and its outcome.

    Args:
        verify: A picklable function or object that a fresh interpreter can import: no lambda, and nothing from a
            script's `__main__`.
        workers: Number of processes.
        grading_timeout: Wall-clock limit in seconds, counted from when that response is handed to a worker.
        limit: The limit in words, for messages: the setting that it comes from, or what it is the limit of.

    Attributes:
        first_failure: The first failure as a sentence without its full stop, or None.

    Raises:
        ValueError: `workers` below 1, or `grading_timeout` not positive and finite.
    """

    first_failure: str | None = None

    def __init__(
        self, verify: Verify, workers: int = 1, grading_timeout: float = 5.0, limit: str = "data.grading_timeout"
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        if not (grading_timeout > 0 and math.isfinite(grading_timeout)):
            raise ValueError(f"grading_timeout must be positive and finite, not {grading_timeout}")
        self._verify = pickle.dumps(verify)
        self._count = workers
        self._seconds = grading_timeout
        self._limit = limit
        self._workers: list[GradingProcess] = []
        self._queue: deque[tuple[int, bytes]] = deque()
        self._grades: dict[int, Grade] = {}
        self._texts: list[str] = []  # texts of the submitted items, for the log
        self._failed_starts = 0
        self._close = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def grade(self, items: Sequence[tuple[Any, str]]) -> list[Grade]:
        """Grades (gold answer, response text) pairs, in their order.

        Raises:
            RuntimeError: The verifier cannot be imported by a worker, workers die or stall (30 s) three times in a
                row before they are ready, or the pool is closed.
            Exception: Pickle cannot pickle a gold answer; nothing has been graded.
        """
        self.discard()
        self.submit(items)
        return self.collect()

    def submit(self, items: Sequence[tuple[Any, str]]) -> None:
        """Queues items to be graded in the background; :meth:`collect` returns their grades. Never waits."""
        if not self._close.alive:
            raise RuntimeError("this grading pool is closed")
        first = len(self._texts)
        queued = [
            (index, pickle.dumps((index, pickle.dumps((gold, text)))))
            for index, (gold, text) in enumerate(items, first)
            if len(text) <= MAX_RESPONSE_CHARS
        ]
        self._texts += [text for _, text in items]
        for index in range(first, len(self._texts)):
            if len(self._texts[index]) > MAX_RESPONSE_CHARS:
                self._fail(index, "invalid", f"reads at most {MAX_RESPONSE_CHARS:,} characters, fewer than has")
        self._queue.extend(queued)
        self.poll()

    def poll(self) -> None:
        """Takes the grades that are ready and hands out further items. Never waits; call it repeatedly."""
        if len(self._grades) < len(self._texts):
            self._advance(0.0)

    def collect(self) -> list[Grade]:
        """Waits for the grades of all items submitted since the last call, and returns them in that order."""
        try:
            while len(self._grades) < len(self._texts):
                soonest = min((worker.deadline for worker in self._workers), default=0.0)
                self._advance(soonest - time.monotonic())
            if self._texts:
                self._refill()  # missing workers load until the next call
            return [self._grades[index] for index in range(len(self._texts))]
        finally:
            self.discard()

    def discard(self) -> None:
        """Drops the submitted items, and kills the workers that grade one."""
        for worker in [worker for worker in self._workers if worker.item is not None]:
            self._kill(worker)
        self._queue.clear()
        self._grades, self._texts = {}, []

    def close(self) -> None:
        """Ends the workers. Safe to call twice."""
        self._close()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _advance(self, seconds: float) -> None:
        """Runs one round; waits at most `seconds` for a reply."""
        self._refill()
        # Replies are read before deadlines are checked: a delayed parent must not fail a grade that has arrived, and a
        # worker that has died since the last round must not get an item.
        self._receive(seconds)
        for worker in list(self._workers):
            if time.monotonic() >= worker.deadline:
                self._lose(worker)
        for worker in self._workers:
            if self._queue and worker.ready and worker.item is None:
                worker.start_item(*self._queue.popleft(), self._seconds)

    def _refill(self) -> None:
        while len(self._workers) < self._count:
            self._workers.append(GradingProcess(self._verify))

    def _receive(self, seconds: float) -> None:
        for worker in ready_processes(self._workers, seconds):
            try:
                reply = worker.exchange()
                if reply is None:
                    continue
                if not worker.ready:
                    self._welcome(worker, reply)
                else:
                    index, grade = worker.finish_item(reply)
                    self._grades[index] = grade
                    if grade.failure is not None:
                        self._note(str(reply.get("reason")))
            except (EOFError, ProtocolError) as error:
                self._lose(worker, "crash" if isinstance(error, EOFError) else "invalid")

    def _welcome(self, worker: GradingProcess, reply: dict[str, Any]) -> None:
        if reply.get("ready") is not True:
            self._kill(worker)
            raise RuntimeError(f"a grading process cannot load the verifier: {str(reply.get('reason'))[:1000]}")
        worker.ready, worker.deadline = True, math.inf
        self._failed_starts = 0

    def _lose(self, worker: GradingProcess, failure: str | None = None) -> None:
        """Kills a worker and fails its item. `failure` is None at a deadline."""
        status = self._kill(worker)
        if worker.item is not None:
            # At a deadline the process may be long dead with the socket kept open by its child: that is a crash.
            failure = failure or ("timeout" if status == -signal.SIGKILL else "crash")
            what = FAILURES[failure].format(seconds=self._seconds, limit=self._limit, status=status)
            self._fail(worker.item, failure, what)
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= START_ATTEMPTS:
                self._failed_starts = 0
                what = (
                    f"died (status {status}) or took over {GradingProcess.start_seconds:g} s while loading the verifier"
                )
                raise RuntimeError(f"{START_ATTEMPTS} grading processes in a row {what}; see their standard error")

    def _kill(self, worker: GradingProcess) -> int:
        self._workers.remove(worker)
        return worker.kill()

    def _fail(self, index: int, failure: str, what: str) -> None:
        """Fails an item whose verifier could not report the reason itself."""
        self._grades[index] = failed(failure)
        self._note(f"{what} {shown(self._texts[index])}")

    def _note(self, reason: str) -> None:
        """Logs a failure: the first as a warning, later ones, which mostly repeat it, only for debugging."""
        sentence = f"the verifier {_in_ascii(reason)[:1000]}"
        logger.log(logging.DEBUG if self.first_failure else logging.WARNING, "%s; that response gets 0", sentence)
        self.first_failure = self.first_failure or sentence


def _in_ascii(text: str) -> str:
    """Escapes what a terminal or a log file might not show as it is."""
    return "".join(one if one.isascii() and one.isprintable() else ascii(one)[1:-1] for one in text)


def _kill_all(workers: list[GradingProcess], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the parent, such as a data loader's worker, must not end them
        while workers:
            workers.pop().kill()


def check_grades(
    counts: dict[str, float], reasons: Sequence[str | None], of_what: str = "of the first iteration"
) -> None:
    """Raises SettingError if no response could be graded: nothing would be learned, and no number would mean anything.

    Args:
        counts: "responses" and "failures" of all ranks together, so that all ranks stop.
        reasons: First failure of each rank's pool.
        of_what: Which responses they are, for the message.
    """
    if counts["responses"] and counts["failures"] == counts["responses"]:
        raise SettingError(
            f"none of the {counts['responses']:.0f} responses {of_what} could be graded: "
            f"{next(filter(None, reasons))}; correct the verifier of data.task, which returns a number or a dict with "
            "a number as its score, or raise data.grading_timeout where it takes longer"
        )
