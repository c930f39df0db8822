"""Verifiers: a gold answer and a response in, reward parts out. Free of torch, for the grading processes."""
