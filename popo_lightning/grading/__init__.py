"""Verifiers run in processes that can be killed, with bounded time and memory."""
