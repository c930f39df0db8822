"""Verifiers run in processes that can be killed: their answers are bounded in time and memory."""
