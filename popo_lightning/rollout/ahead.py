"""Asynchronous rollouts: generates and grades the next iteration's groups while this one trains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.timing import PhaseClock

log = logging.getLogger(__name__)

Made = Callable[[], list[Group]]


class AsyncRollouts:
    """Holds groups for the next iteration, in the order in which the prompt sampler drew their problems.

    They are generated in a separate thread, one batch at a time. Every user of the engine, the graders or this object's
    state first waits for that thread, so only training runs beside it. Its error is raised by the next call that waits.
    Metrics, counts and observations of the sampler belong to the iteration that takes the groups.

    Groups that a composer does not take stay queued; the next iteration generates that many fewer.
    """

    def __init__(self) -> None:
        self._seconds: float | None = None  # duration of the last batch
        self._generate_seconds = 0.0  # seconds of generation since the last report
        self._ready: list[tuple[int, Group]] = []  # (index of the problem, group)
        self._under_way: tuple[list[int], PhaseClock, Future[list[Group]]] | None = None
        self._thread: _Background | None = None

    def __len__(self) -> int:
        """Number of groups, including those under way."""
        return len(self._ready) + (len(self._under_way[0]) if self._under_way else 0)

    def begin(self, indices: Sequence[int], clock: PhaseClock, make: Made) -> None:
        """Starts to make further groups.

        Args:
            indices: Indices of their problems, as the sampler drew them.
            clock: Clock for these groups only, because one clock cannot measure two threads.
            make: Generates and grades the groups; runs in the background.
        """
        self.join()
        if indices:
            self._thread = self._thread or _Background()
            self._under_way = list(indices), clock, self._thread.submit(make)

    def join(self) -> None:
        """Waits for the groups under way, and raises the error of the background thread."""
        if self._under_way is None:
            return
        indices, clock, future = self._under_way
        try:
            groups = future.result()
        finally:
            if future.done():  # false if this wait was interrupted
                self._under_way = None
        self._generate_seconds += clock.seconds("generate")
        self._seconds = sum(clock.take().values())
        self._ready += zip(indices, groups, strict=True)

    def take(self, count: int, n: int) -> list[tuple[int, Group]]:
        """Removes and returns up to `count` groups from the front of the queue, each as (problem index, group).

        Raises:
            SettingError: A group does not have n responses.
        """
        self.join()
        taken, self._ready = self._ready[:count], self._ready[count:]
        for _, group in taken:
            if len(group.responses) != n:
                raise SettingError(
                    f"data.async_level generated groups of {len(group.responses)} responses ahead (data.group_size), "
                    f"but now {n} are asked for; resume with the group_size the run had, or set data.async_level to 0 "
                    "from the start"
                )
        return taken

    def report(self) -> dict[str, float]:
        """Returns the seconds spent in the background, which are not part of the iteration's seconds."""
        return {} if self._seconds is None else {"time/ahead": self._seconds}

    def take_generate_seconds(self) -> float:
        """Returns the seconds of generation, without grading, since the last call."""
        found, self._generate_seconds = self._generate_seconds, 0.0
        return found

    def close(self) -> None:
        """Waits for the groups under way, and ends the thread."""
        try:
            self.join()
        except Exception as error:  # does not end the run, because no iteration needs these groups
            log.warning("generating ahead failed, after the last iteration: %s", error)
        if self._thread is not None:
            self._thread.close()
        self._thread = None

    def state_dict(self) -> dict[str, Any]:
        """Returns all groups, including those under way; empty if there are none."""
        self.join()
        if not self._ready:
            return {}
        return {
            "indices": [index for index, _ in self._ready],
            "groups": [group for _, group in self._ready],
            "generate_seconds": self._generate_seconds,
        }

    def load_state_dict(self, state: dict[str, Any], async_level: int = 1) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            SettingError: The state has groups, but async_level is 0, so the run may not correct for their age.
        """
        if state and not async_level:
            raise SettingError(
                "data.async_level is 0, but the checkpoint holds groups that were generated ahead for the next "
                "iteration; resume with data.async_level 1"
            )
        self._generate_seconds = state.get("generate_seconds", 0.0)
        self._ready = list(zip(state.get("indices", []), state.get("groups", []), strict=True))


class _Background:
    """A thread that outlives its tasks, because a grading process ends with the thread that started it."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Made, Future[list[Group]]] | None] = SimpleQueue()
        # It is a daemon, so that a process that is told to stop does not wait for a batch.
        self._thread = threading.Thread(target=self._work, name="look-ahead", daemon=True)
        self._thread.start()

    def submit(self, make: Made) -> Future[list[Group]]:
        future: Future[list[Group]] = Future()
        self._tasks.put((make, future))
        return future

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            make, future = task
            try:
                future.set_result(make())
            except BaseException as error:  # join raises it in the main thread
                future.set_exception(error)
