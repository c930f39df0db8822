"""Callbacks: proximal snapshot, evaluation, and what a user sees of a run."""
