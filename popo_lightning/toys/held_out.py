"""Decides which problems are held out, from their content."""

from __future__ import annotations

import hashlib


def place_of(problem: str) -> float:
    """A place in [0, 1) that the text alone decides: below the held-out share, a problem is held out."""
    return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8]) / 2**64
