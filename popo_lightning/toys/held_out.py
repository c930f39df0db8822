"""Decides by a hash of the problems which are held out."""

from __future__ import annotations

import hashlib
from typing import Any

from popo_lightning.core.bounds import at_least, between


def hash_fraction(problem: str) -> float:
    """Hashes a problem's text to a number in [0, 1). A problem is held out if it is below the held-out share."""
    return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8]) / 2**64


def check_split(task: Any, *counts: str) -> None:
    """Raises SettingError for a count below 1, or a held-out share that leaves no problem on one side.

    Args:
        task: Task with a `held_out_share`.
        counts: Names of its settings that count something.
    """
    for name in counts:
        at_least(f"data.task.{name}", getattr(task, name), 1)
    between("data.task.held_out_share", task.held_out_share, 0, 1, ", such as 0.33")
