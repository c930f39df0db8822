"""Reward functions in a module that a grading process imports at once."""

from __future__ import annotations


def longest(text: str) -> float:
    """Rewards longer responses."""
    return float(len(text))
