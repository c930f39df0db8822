"""Engines that sample responses: one small protocol, vLLM colocated in the process, and plain transformers."""
