"""Measures the seconds of an iteration by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up wall seconds by phase name."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to a phase, except those of phases measured inside."""
        start, others = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
        finally:
            inner = sum(self._seconds.values()) - others
            self._seconds[phase] += time.perf_counter() - start - inner

    def seconds(self, *phases: str) -> float:
        """Seconds spent in some phases since the last :meth:`take`."""
        return sum(self._seconds.get(phase, 0.0) for phase in phases)

    def take(self) -> dict[str, float]:
        """Returns the seconds by phase since the last call."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def give_back(self, seconds: dict[str, float]) -> None:
        """Adds seconds that were taken before."""
        for phase, value in seconds.items():
            self._seconds[phase] += value
