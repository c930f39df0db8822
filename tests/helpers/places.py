"""Paths of the repository, its tests and the shared facts."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent.parent
REPOSITORY = TESTS.parent
POLICIES = TESTS / "policies"  # tests use these; popo_lightning/toys/policies has those of users
SHARED = REPOSITORY.parent / "shared"  # missing in a user's checkout; tests that read it are skipped there
