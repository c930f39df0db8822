"""Drops the prefixes that a vLLM server has cached."""

from __future__ import annotations

import time

from popo_lightning.engines.servers.client import Server

RESET_TRIES = 60


def reset_caches(server: Server) -> None:
    """Drops cached prefixes of the old weights; vLLM refuses while a request is in progress.

    Raises:
        ServerFailedError: The server does not answer.
        RuntimeError: The server refuses, again and again.
    """
    for _ in range(RESET_TRIES):
        answer = server.ask("POST", "/reset_prefix_cache")
        if isinstance(answer, dict) and answer.get("success") is True:
            return
        time.sleep(0.5)
    raise RuntimeError(f"{server.url} does not reset its prefix cache; is another run using it?")
