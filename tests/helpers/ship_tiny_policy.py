"""Builds the tiny policy of the tests by its recipe and stores it where every test session copies it.

    PYTHONPATH=tests python tests/helpers/ship_tiny_policy.py

Weights built on another kind of processor differ by rounding. With the stored weights a run replays the same groups on
every machine.
"""

from __future__ import annotations

import shutil

from helpers.places import POLICIES
from helpers.tiny_models import tiny_policy

if __name__ == "__main__":
    shutil.rmtree(POLICIES, ignore_errors=True)
    tiny_policy().build_at(POLICIES / tiny_policy().address)
    for lock in POLICIES.glob("*.lock"):
        lock.unlink()
