"""Writes text files that are complete, whatever interrupts the writer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replaced(path: Path) -> Iterator[IO[str]]:
    """Yields a file beside a path, which takes the path's place once it is complete, or is removed on failure.

    Args:
        path: Place of the file; an earlier one stays until then. Line ends are written as they are.
    """
    draft = path.with_name(f"{path.name}.draft")
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            yield file
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
