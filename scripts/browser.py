"""Drives a headless Chromium over a pipe by its own protocol (DevTools, https://chromedevtools.github.io)."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
SECONDS = 60.0


class Page:
    """A tab.

    Attributes:
        complaints: Errors and warnings on its console, exceptions, and what its security policy blocked.
    """

    def __init__(self) -> None:
        from_here, self._to = os.pipe()
        self._from, to_here = os.pipe()
        self._profile = tempfile.mkdtemp(prefix="popo-browser-")
        command = [CHROMIUM, *SWITCHES, f"--user-data-dir={self._profile}", "about:blank"]
        moved = f'exec 3<&{from_here} 4>&{to_here}; exec "$@"'  # the protocol's two descriptors
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *command],
            pass_fds=(from_here, to_here),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_here)
        os.close(to_here)
        self._unread, self._count, self._session = b"", 0, ""
        self.complaints: list[str] = []

    def __enter__(self) -> Page:
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command of the protocol and returns its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        ends = time.monotonic() + SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, ends - time.monotonic()))
            read = os.read(self._from, 1 << 20) if ready else b""
            if not read:
                raise RuntimeError("Chromium is gone" if ready else "Chromium does not answer")
            self._unread += read
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:2000])
        elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"])[:2000])
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])

    def open(self, place: Path | str, width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        """Loads a file, or a URL."""
        url = place.absolute().as_uri() if isinstance(place, Path) else place
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")
        return self

    def ask(self, script: str) -> Any:
        """Returns the value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Waits until an expression is true."""
        ends = time.monotonic() + SECONDS
        while not self.ask(script):
            if time.monotonic() > ends:
                raise RuntimeError(f"never true: {script}")
            time.sleep(0.05)

    def picture(self, x: float, y: float, width: float, height: float) -> bytes:
        """Returns a PNG of a part of the page, regardless of its scroll position."""
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(found["data"])
