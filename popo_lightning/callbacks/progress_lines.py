"""The progress of a run: the bar in a terminal, and the same numbers for a line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Course:
    """Counts the iterations done and measures the time they take.

    Args:
        whole: Iterations of the run; 0 if it has no end.
        first: Iterations done before this process.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, whole: int, first: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.whole, self.first, self.done = whole, first, first
        self._clock, self._began = clock, clock()
        self._last = self._began  # time at which the last iteration ended

    def advance(self, done: int) -> None:
        """Sets the number of iterations done."""
        self.done, self._last = done, self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start in this process."""
        return self._clock() - self._began

    @property
    def an_iteration(self) -> float | None:
        """Mean seconds per iteration, evaluations included; None before the first iteration has ended."""
        made = self.done - self.first
        return (self._last - self._began) / made if made > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds to the end; None if unknown."""
        if self.an_iteration is None or not self.whole:
            return None
        return max(0.0, self.an_iteration * (self.whole - self.done) - (self._clock() - self._last))

    def values(self) -> dict[str, str]:
        """Numbers for a line in a log, by name."""
        shown = {"iteration": f"{self.done}/{self.whole}" if self.whole else str(self.done)}
        shown["elapsed"] = hours(self.elapsed)
        if self.an_iteration is not None:
            shown["s/iteration"] = f"{self.an_iteration:.1f}"
        if self.left is not None:
            shown["ETA"] = hours(self.left)
        return shown


def hours(seconds: float) -> str:
    """Formats seconds as 1:02:03."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def bar(course: Course | None, work: str, values: dict[str, str], began: float) -> RenderableType:
    """Lines that a terminal shows of a run in progress.

    Args:
        course: Progress of the iterations; None before the first.
        work: Present work, in words.
        values: Metrics of the last iteration, by their names in the terminal.
        began: Time at which the process began to show anything.
    """
    if course is None:
        return Text(f"{hours(time.perf_counter() - began)}  {work}")
    line = Table.grid(padding=(0, 2, 0, 0))
    numbers = course.values()
    cells: list[RenderableType] = [f"iteration {numbers.pop('iteration')}"]
    if course.whole:
        cells.append(ProgressBar(total=course.whole, completed=course.done, width=24))
    cells += [f"{name} {value}" for name, value in numbers.items()]
    line.add_row(*cells, work)
    if not values:
        return line
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in values:
        table.add_column(name, no_wrap=True)
    table.add_row(*values.values())
    return Group(line, table)
