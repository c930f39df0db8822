"""Distributes requests over several servers: each to the server with the fewest, and to another if that one fails."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar, cast

from popo_lightning.engines.servers.answers import MalformedAnswerError, WrongVersionError
from popo_lightning.engines.servers.client import RequestRefusedError, Server, ServerFailedError

Job = TypeVar("Job")
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class ServerPool:
    """Distributes requests over servers. A dropped server is used again after the next sync if it answers then.

    Args:
        servers: The servers.
        per_server: Maximum concurrent requests per server.
        attempts: Maximum attempts per request on healthy servers; then the run stops.
    """

    def __init__(self, servers: Sequence[Server], per_server: int, attempts: int) -> None:
        self.servers = list(servers)
        self.per_server = per_server
        self.attempts = attempts
        self._changed = threading.Condition()

    @property
    def alive(self) -> list[Server]:
        """Servers that requests are sent to."""
        return [server for server in self.servers if server.alive]

    def drop(self, server: Server, reason: object) -> None:
        """Sends a server no more requests until the next sync."""
        with self._changed:
            if server.alive:
                log.warning("the server %s is left out until the next sync: %s", server.url, reason)
            server.alive = False
            self._changed.notify_all()

    def map(self, ask: Callable[[Server, Job], Answer], jobs: Sequence[Job]) -> list[Answer]:
        """Returns the answers, in the order of the jobs.

        Args:
            ask: Sends one job to one server; raises the errors of :class:`Server` and of the module answers.
            jobs: Jobs to send.

        Raises:
            RuntimeError: No server is left, a server refuses a job, or a job has failed too often.
        """
        todo = deque(enumerate(jobs))
        done: SimpleQueue[tuple[int, Answer | None, BaseException | None]] = SimpleQueue()

        def work() -> None:
            while todo:
                try:
                    place, job = todo.popleft()
                except IndexError:  # another thread was quicker
                    return
                try:
                    done.put((place, self._one(ask, job), None))
                except BaseException as error:
                    done.put((place, None, error))

        for _ in range(min(len(jobs), self.per_server * len(self.servers))):
            # daemons, so that a process that must stop does not wait for answers
            threading.Thread(target=work, name="server-request", daemon=True).start()
        answers: dict[int, Answer] = {}
        try:
            for _ in jobs:
                place, answer, error = done.get()
                if error is not None:
                    raise error
                answers[place] = cast(Answer, answer)
        finally:  # after an error, requests in progress end by themselves, at the latest at their timeout
            todo.clear()
        return [answers[place] for place in range(len(jobs))]

    def _one(self, ask: Callable[[Server, Job], Answer], job: Job) -> Answer:
        failures: list[str] = []
        avoided: Server | None = None
        while len(failures) < self.attempts:
            server = self._take(avoided)
            try:
                return ask(server, job)
            except RequestRefusedError:
                raise
            except WrongVersionError as error:  # restarted, or given other weights by another run
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
        """Takes the server with the fewest requests, but avoids the one that has just failed."""
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
