"""Verifiers: map a gold answer and a response to reward components. Free of torch, for the grading processes."""
