"""One vLLM server over HTTP, with the standard library; every wait has a timeout."""

from __future__ import annotations

import ipaddress
import json
import selectors
import socket
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

PROBE_SECONDS = 10.0
RESET_TRIES = 60
ANSWER_BYTES = 2**20  # maximum size of an answer without responses


class ServerFailedError(Exception):
    """A server did not answer, or answered incorrectly. Another server may answer."""


class RequestRefusedError(RuntimeError):
    """A server understood and refused the request; every other server would refuse it too."""


class Server:
    """One server's address and state.

    Args:
        url: http or https, host and port.

    Attributes:
        outstanding: Number of unanswered requests.
        alive: Whether requests are sent to it until the next sync.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"'{url}' is no address of a server")
        self.url = url.rstrip("/")
        self.host, self.port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.outstanding = 0
        self.alive = True
        self._probed = threading.Lock()
        self._probe_at, self._probe_said = 0.0, True

    @property
    def is_here(self) -> bool:
        """Whether the server's address is this machine's own loopback."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_private(self) -> bool:
        """Whether the server's addresses cannot be reached from everywhere."""
        if self.is_here:
            return True
        try:
            found = socket.getaddrinfo(self.host, None)
        except OSError:  # the first request reports it
            return True
        return all(ipaddress.ip_address(str(entry[4][0]).split("%")[0]).is_private for entry in found)

    def ask(self, method: str, path: str, body: Any = None, seconds: float = 60.0, most: int = ANSWER_BYTES) -> Any:
        """Sends a request. Returns the JSON of the answer, or None for an empty answer.

        The server is probed while it works on an answer, so that a dead server is noticed long before the timeout.

        Args:
            method: GET or POST.
            path: Path after the url.
            body: Body, sent as JSON.
            seconds: Maximum wait.
            most: Maximum size of the answer in bytes.

        Raises:
            ServerFailedError: The answer is late, broken or too long, or the server failed.
            RequestRefusedError: The status is 4xx.
        """
        ends = time.monotonic() + seconds
        connection = self._kind(self.host, self.port, timeout=min(seconds, PROBE_SECONDS))
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, data, {"Content-Type": "application/json"})
            self._wait(connection, ends, probe=path != "/health")
            connection.sock.settimeout(max(0.1, ends - time.monotonic()))
            response = connection.getresponse()
            content = _read(response, connection, ends, most)
            status = response.status
        except (OSError, HTTPException) as error:
            raise ServerFailedError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if 400 <= status < 500:
            raise RequestRefusedError(f"{self.url}{path} refuses ({status}): {content[:500].decode(errors='replace')}")
        if status != 200:
            raise ServerFailedError(f"{self.url}{path} fails ({status}): {content[:500].decode(errors='replace')}")
        try:
            return json.loads(content) if content else None
        except (ValueError, RecursionError) as error:
            raise ServerFailedError(f"{self.url}{path} answers something else than JSON") from error

    def _wait(self, connection: HTTPConnection, ends: float, probe: bool) -> None:
        """Waits until an answer begins to arrive."""
        with selectors.DefaultSelector() as selector:  # select() takes at most 1024 open files
            selector.register(connection.sock, selectors.EVENT_READ)
            while not selector.select(max(0.0, min(PROBE_SECONDS, ends - time.monotonic()))):
                if time.monotonic() >= ends:
                    raise TimeoutError("no answer in time")
                if probe and not self.answers():
                    raise TimeoutError("it does not answer any more")

    def answers(self) -> bool:
        """Whether the server says that it is well. It is asked once in a few seconds, however many requests wait."""
        with self._probed:
            if time.monotonic() - self._probe_at > PROBE_SECONDS / 2:
                try:
                    self.ask("GET", "/health", seconds=PROBE_SECONDS)
                    self._probe_said = True
                except (ServerFailedError, RequestRefusedError):
                    self._probe_said = False
                self._probe_at = time.monotonic()
            return self._probe_said

    def reset_caches(self) -> None:
        """Drops cached prefixes of the old weights; vLLM refuses while a request is in progress.

        Raises:
            ServerFailedError: The server does not answer.
            RuntimeError: The server refuses, again and again.
        """
        for _ in range(RESET_TRIES):
            answer = self.ask("POST", "/reset_prefix_cache")
            if isinstance(answer, dict) and answer.get("success") is True:
                return
            time.sleep(0.5)
        raise RuntimeError(f"{self.url} does not reset its prefix cache; is another run using it?")

    def forget_probe(self) -> None:
        """Makes the next :meth:`answers` ask the server."""
        self._probe_at = 0.0


def _read(response: HTTPResponse, connection: HTTPConnection, ends: float, most: int) -> bytes:
    """Reads a whole answer, within its time and length."""
    content = bytearray()
    while True:
        if connection.sock is not None:
            connection.sock.settimeout(max(0.1, ends - time.monotonic()))
        piece = response.read1(65536)
        content += piece
        if not piece:
            return bytes(content)
        if len(content) > most:
            raise HTTPException(f"its answer is longer than {most} bytes")
        if time.monotonic() > ends:
            raise TimeoutError("its answer does not come to an end")
