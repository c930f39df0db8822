"""Where the repository, its tests and the shared facts lie."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent.parent
REPOSITORY = TESTS.parent
SHARED = REPOSITORY.parent / "shared"  # not in a checkout of a user: a test that reads it skips where it is missing
