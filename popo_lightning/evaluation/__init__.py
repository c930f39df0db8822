"""Accuracy on held-out benchmarks: when, on what, how it is counted, files and tables."""
