"""What a run is doing at present, and how much of it is done, for display."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Work:
    """The present piece of work. It reports every change to one listener and affects nothing else.

    Attributes:
        what: Description, such as "sampling".
        done: Number of pieces that are done.
        whole: Number of all pieces; 0 if they are not counted.
        changed: Function that is called after every change.
    """

    def __init__(self) -> None:
        self.what, self.done, self.whole = "sampling", 0, 0
        self.changed: Callable[[], None] = lambda: None

    def advance(self, done: int, whole: int) -> None:
        """Sets how many pieces are done, and reports it."""
        self.done, self.whole = done, whole
        self.changed()

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Shows another piece of work while the context lasts."""
        before = self.what
        self.what, self.done, self.whole = what, 0, 0
        self.changed()
        try:
            yield
        finally:
            self.what, self.done, self.whole = before, 0, 0
            self.changed()

    def __str__(self) -> str:
        return f"{self.what} {self.done:,}/{self.whole:,}" if self.whole else self.what
