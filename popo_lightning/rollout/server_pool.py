"""Requests over several servers: each to the one with the least to do, and to another where one fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from popo_lightning.rollout.server import RequestRefusedError, Server, ServerFailedError
from popo_lightning.rollout.server_answers import MalformedAnswerError, WrongVersionError

Job = TypeVar("Job")
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class ServerPool:
    """Shares requests out. Dropped servers come back, if at all, with the next sync.

    Args:
        servers: Where to ask.
        per_server: Requests that one server is given at a time.
        attempts: Times one request may fail on servers that are well; then the run stops.
    """

    def __init__(self, servers: Sequence[Server], per_server: int, attempts: int) -> None:
        self.servers = list(servers)
        self.per_server = per_server
        self.attempts = attempts
        self._changed = threading.Condition()

    @property
    def alive(self) -> list[Server]:
        """Those that are asked."""
        return [server for server in self.servers if server.alive]

    def drop(self, server: Server, reason: object) -> None:
        """Asks it no more until the next sync."""
        with self._changed:
            if server.alive:
                log.warning("the server %s is left out until the next sync: %s", server.url, reason)
            server.alive = False
            self._changed.notify_all()

    def map(self, ask: Callable[[Server, Job], Answer], jobs: Sequence[Job]) -> list[Answer]:
        """The answers, in the order of the jobs.

        Args:
            ask: Sends one job to one server; raises what :class:`Server` and server_answers raise.
            jobs: What to send.

        Raises:
            RuntimeError: No server is left, one refuses, or a job has failed too often.
        """
        threads = max(1, min(len(jobs), self.per_server * len(self.servers)))
        executor = ThreadPoolExecutor(threads, thread_name_prefix="server-request")
        try:
            futures = [executor.submit(self._one, ask, job) for job in jobs]
            return [future.result() for future in futures]
        finally:  # after an error those under way end by themselves, at the latest when their time is up
            executor.shutdown(wait=False, cancel_futures=True)

    def _one(self, ask: Callable[[Server, Job], Answer], job: Job) -> Answer:
        failures: list[str] = []
        avoided: Server | None = None
        while len(failures) < self.attempts:
            server = self._take(avoided)
            try:
                return ask(server, job)
            except RequestRefusedError:
                raise
            except WrongVersionError as error:  # restarted, or given other weights by somebody else
                self.drop(server, error)
            except MalformedAnswerError as error:
                failures.append(f"{server.url}: {error}")
            except ServerFailedError as error:
                server.forget_probe()
                if server.answers():
                    failures.append(str(error))
                else:
                    self.drop(server, error)
            finally:
                self._give_back(server)
            avoided = server
        raise RuntimeError(f"a request to the servers of data.engine failed {len(failures)} times: {failures[-1]}")

    def _take(self, avoided: Server | None) -> Server:
        """The server with the fewest requests, and rather not the one that has just failed."""
        with self._changed:
            while True:
                if not self.alive:
                    raise RuntimeError(
                        "none of data.engine.urls is left to ask ("
                        + ", ".join(server.url for server in self.servers)
                        + "); see the warnings above, start them again with scripts/serve.sh and resume the run"
                    )
                others = [server for server in self.alive if server is not avoided] or self.alive
                server = min(others, key=lambda server: server.outstanding)
                if server.outstanding < self.per_server:
                    server.outstanding += 1
                    return server
                self._changed.wait()

    def _give_back(self, server: Server) -> None:
        with self._changed:
            server.outstanding -= 1
            self._changed.notify_all()
