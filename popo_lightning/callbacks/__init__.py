"""Callbacks: metrics, health warnings, progress, samples, checkpoints, stop signals and the summary of a run."""
