"""A fake vLLM server in a thread, for ServerEngine. It samples noise and fails on command."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

END, VOCABULARY = 1, 20
DESCRIPTION = {
    "dtype": "float32",
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "max_model_len": 64,
    "vocab_size": VOCABULARY,
}


class FakeServer:
    """Answers by its attributes, which it reads at each request, so a test can change its behavior while it runs."""

    def __init__(self, port: int = 0) -> None:
        self.version = "default"
        self.vllm: str | None = "0.32.0"
        self.description: dict[str, Any] = dict(DESCRIPTION)
        self.weights: dict[str, Any] = {}
        self.load_answer: dict[str, Any] | None = None
        self.reset_succeeds = True
        self.says_version: str | None = None  # reported instead of the version it was given
        self.seconds = 0.0  # duration of a request
        self.status = 200  # status of responses
        self.hangs = False  # answers nothing at all
        self.mangle: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.dies_after: int | None = None  # number of requests for responses
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.now = self.most = 0  # concurrent requests
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    # -- what it answers ---------------------------------------------------------------------------------------

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Returns (status, JSON). Status 0 breaks the connection."""
        with self.lock:
            self.paths.append(path)
        if self.hangs:
            self.released.wait(30)
            return 0, None
        if path == "/inference/v1/generate":
            return self._generate(body)
        if path == "/collective_rpc":
            return 200, {"results": [self._worker(body["method"], body["kwargs"])]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/reset_prefix_cache":
            return 200, {"success": self.reset_succeeds}
        if path == "/version":
            return (404, None) if self.vllm is None else (200, {"version": self.vllm})
        if path == "/weight_info":
            return 200, {"weight_version": self.says_version or self.version}
        return 200, None

    def _worker(self, method: str, arguments: dict[str, Any]) -> Any:
        if method == "describe_policy_server":
            return self.description
        if self.load_answer is not None:
            return self.load_answer
        files = sorted(Path(arguments["folder"]).glob("*.safetensors"))
        self.weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return {"files": len(files)}

    def _generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.requests.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
            dead = self.dies_after is not None and len(self.requests) > self.dies_after
        version = self.version
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        if dead:
            self.hangs = True  # no later request is answered, not even for health
            self.released.set()
            return 0, None
        if self.status != 200:
            return self.status, {"error": {"message": "not this way"}}
        return 200, self.mangle(answer_to(body, version))


def answer_to(body: dict[str, Any], version: str) -> dict[str, Any]:
    """Returns noise that depends only on prompt and seed."""
    asked = body["sampling_params"]
    choices = []
    for index in range(asked["n"]):
        draw = random.Random(f"{body['token_ids']}/{asked['seed']}/{index}")
        ids = [draw.randrange(2, VOCABULARY) for _ in range(draw.randrange(1, asked["max_tokens"] + 1))]
        if len(ids) < asked["max_tokens"]:
            ids[-1] = END
        logps = [-draw.random() for _ in ids]
        choices.append(
            {
                "index": index,
                "token_ids": ids,
                "finish_reason": "stop" if ids[-1] == END else "length",
                "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
                "logprobs": {"content": [{"token_id": i, "logprob": logp} for i, logp in zip(ids, logps, strict=True)]},
            }
        )
    return {"prompt_token_ids": body["token_ids"], "choices": choices}


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null"))

        def _answer(self, body: Any) -> None:
            status, content = server.answer(self.path, body)
            if not status:
                self.close_connection = True
                return
            data = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
