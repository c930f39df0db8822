"""Rollout engines: vLLM in the trainer's process, vLLM servers, and plain transformers."""
