"""Verifiers map a gold answer and a response to reward components. They do not import torch, for grading processes."""
