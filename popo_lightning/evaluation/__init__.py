"""Accuracy on held-out benchmarks: schedule, settings, statistics, files and tables."""
