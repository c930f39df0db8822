"""Decides by a hash of the problems which are held out."""

from __future__ import annotations

import hashlib


def hash_fraction(problem: str) -> float:
    """Hashes a problem's text to a number in [0, 1). A problem is held out if it is below the held-out share."""
    return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8]) / 2**64
