"""Writes text files that are complete, whatever interrupts the writer."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and moves it there once it is complete.

    Args:
        path: Place of the file; an earlier one is replaced.
        text: Its content.

    Raises:
        OSError: The file cannot be written; an earlier one is still there.
    """
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
