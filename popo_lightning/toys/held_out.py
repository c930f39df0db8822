"""Decides by a hash of the problems which are held out."""

from __future__ import annotations

import hashlib
from typing import Any

from popo_lightning.core.errors import SettingError


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
        if getattr(task, name) < 1:
            raise SettingError(f"data.task.{name} is {getattr(task, name)}; use at least 1")
    if not 0 < task.held_out_share < 1:
        raise SettingError(f"data.task.held_out_share is {task.held_out_share}; use a share between 0 and 1")
