"""The course of a metric over iterations, and when it has been out of range long enough to be spoken of."""

from __future__ import annotations

from dataclasses import dataclass, field

WINDOW = 10  # iterations over which the effective share is averaged: that of a few groups is often 0 by chance
RECOVERED = 10  # iterations in range, after which a metric may be spoken of again
MOST_SAID = 3  # times that a kind is spoken of in a run


@dataclass
class Watched:
    """What is remembered of one kind of statement.

    Args:
        outside: Iterations in a row out of range.
        inside: Iterations in a row in range.
        told: Whether the present excursion has been spoken of.
        said: Times it has been spoken of.
    """

    outside: int = 0
    inside: int = 0
    told: bool = False
    said: int = 0

    def sees(self, is_outside: bool, patience: int) -> bool:
        """Takes note of an iteration, and says whether it is time to speak."""
        self.outside = self.outside + 1 if is_outside else 0
        self.inside = 0 if is_outside else self.inside + 1
        if self.inside >= RECOVERED:
            self.told = False
        if self.outside < patience or self.told or self.said >= MOST_SAID:
            return False
        self.told, self.said = True, self.said + 1
        return True


@dataclass
class Course:
    """What a metric was at the start of the run and is now.

    Args:
        first: Values of the first iterations that have it.
        recent: Those of the last.
    """

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """The next iteration's."""
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.recent = [*self.recent, value][-WINDOW:]

    @property
    def start(self) -> float:
        """Mean at the start."""
        return sum(self.first) / max(1, len(self.first))

    @property
    def now(self) -> float:
        """Mean of late."""
        return sum(self.recent) / max(1, len(self.recent))

    @property
    def whole(self) -> bool:
        """Whether there are enough values for a mean."""
        return len(self.recent) == WINDOW


def below(value: float | None, limit: float | None) -> bool | None:
    """None where the metric is not there, or nothing is asked of it."""
    return None if value is None or limit is None else value < limit


def above(value: float | None, limit: float | None) -> bool | None:
    """As :func:`below`."""
    return None if value is None or limit is None else value > limit
