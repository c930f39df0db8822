"""The course of a metric over iterations, and whether it has been out of range long enough for a warning."""

from __future__ import annotations

from dataclasses import dataclass, field

WINDOW = 10  # iterations in a mean: the effective share of a few groups is often 0 by chance
RECOVERED = 10  # consecutive iterations in range, after which a kind may be warned of again
MAX_SAID = 3  # warnings of one kind per run


@dataclass
class Watched:
    """State of one kind of warning.

    Args:
        outside: Consecutive iterations out of range.
        inside: Consecutive iterations in range.
        told: Whether the present excursion has been warned of.
        said: Number of warnings so far.
    """

    outside: int = 0
    inside: int = 0
    told: bool = False
    said: int = 0

    def sees(self, is_outside: bool, patience: int) -> bool:
        """Notes an iteration, and returns whether to warn now."""
        self.outside = self.outside + 1 if is_outside else 0
        self.inside = 0 if is_outside else self.inside + 1
        if self.inside >= RECOVERED:
            self.told = False
        if self.outside < patience or self.told or self.said >= MAX_SAID:
            return False
        self.told, self.said = True, self.said + 1
        return True


@dataclass
class Course:
    """Values of a metric at the start of the run and now.

    Args:
        first: Values of the first iterations that have the metric.
        recent: Values of the last iterations that have it.
    """

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Adds the value of the next iteration."""
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.recent = [*self.recent, value][-WINDOW:]

    @property
    def start(self) -> float:
        """Mean of the first values."""
        return sum(self.first) / max(1, len(self.first))

    @property
    def now(self) -> float:
        """Mean of the recent values."""
        return sum(self.recent) / max(1, len(self.recent))

    @property
    def whole(self) -> bool:
        """Whether there are enough recent values for a mean."""
        return len(self.recent) == WINDOW
