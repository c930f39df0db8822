"""Samples with vLLM servers apart from the trainer, over HTTP."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.ranks import all_gather_object
from popo_lightning.engines.base import (
    Ask,
    EngineContext,
    NamedTensors,
    RolloutEngine,
    Sampling,
    asks,
    end_token_ids,
    responses_of,
)
from popo_lightning.engines.servers.answers import Asked, Sampled, sampled
from popo_lightning.engines.servers.checks import call, check, check_version, warn_of_open
from popo_lightning.engines.servers.client import Server, ServerFailedError
from popo_lightning.engines.servers.pool import ServerPool
from popo_lightning.engines.servers.weight_files import write_weights
from popo_lightning.engines.stop_strings import StopStrings
from popo_lightning.engines.vllm.requests import request_settings
from popo_lightning.model.prompts import Prompt

LOADING = "loading"  # a server's version while some of its weights are old
MIN_SECONDS, SLOW_TOKENS_PER_SECOND = 600.0, 1000.0  # for a request's maximum wait, unless it is set


class ServerEngine(RolloutEngine):
    """Samples with vLLM servers that run independently and keep running when the trainer stops.

    Token ids go in and come out (/inference/v1/generate), with the version of the weights for every token.
    scripts/serve.sh starts a server with all required options. All ranks share the servers; rank 0 sends the weights,
    while the others take part in gathering them.

    Weights are sent through a folder. None of the backends of vLLM 0.32's weight transfer works on a CPU (measured: ipc
    ends in "Torch not compiled with CUDA enabled" and stops the server; nccl sends over CUDA streams). So weights are
    saved as safetensors and read by a method of the worker that also renews packed copies of tied heads. The version is
    vLLM's own, /update_weight_version. A response is accepted only if every token of it carries the last version sent,
    so a server that has restarted, or received weights from another run, contributes nothing to training.

    Seeds are per prompt, so a call draws the same tokens on every server; log-probs may differ in their last bits with
    the rest of the batch.

    Args:
        urls: Addresses of the servers, such as http://127.0.0.1:8000. Their development endpoints have no password.
        weights_folder: Folder for sending weights, visible to the trainer and the servers. null uses a temporary
            folder, for servers on this machine.
        requests_per_server: Maximum concurrent prompts per server.
        attempts: Maximum attempts per request on healthy servers before the run fails.
        start_seconds: Maximum wait for servers that are still starting.
        request_seconds: Maximum wait for the responses to one prompt. null is 600 s, plus 1 s for every 1,000 tokens
            that a server may work on at once: response limit x responses x requests_per_server.
        sync_seconds: Maximum wait for a server to read the weights.
    """

    generates_while_training = spreads_temperature = True
    loads_model = False  # a server's weights may be another run's

    def __init__(
        self,
        urls: list[str],
        weights_folder: str | None = None,
        requests_per_server: int = 64,
        attempts: int = 3,
        start_seconds: float = 180.0,
        request_seconds: float | None = None,
        sync_seconds: float = 600.0,
    ) -> None:
        counts = {"requests_per_server": requests_per_server, "attempts": attempts}
        waits = {"start_seconds": start_seconds, "sync_seconds": sync_seconds}
        waits |= {} if request_seconds is None else {"request_seconds": request_seconds}
        for name, value in (counts | waits).items():
            if value < (1 if name in counts else 0.1):
                raise SettingError(f"data.engine.{name} is {value}; use at least 1")
        if not urls or len(set(urls)) != len(urls):
            raise SettingError(f"data.engine.urls is {urls}; name at least one server, and each once")
        self.pool = ServerPool([_server(url) for url in urls], requests_per_server, attempts)
        elsewhere = [server.url for server in self.pool.servers if not server.is_here]
        if elsewhere and weights_folder is None:
            raise SettingError(
                f"data.engine.weights_folder is null, but {elsewhere[0]} of data.engine.urls may be another machine; "
                "give a folder that trainer and servers both see"
            )
        self.weights_folder = weights_folder
        self.start_seconds = start_seconds
        self.request_seconds = request_seconds
        self.sync_seconds = sync_seconds
        self._label: str | None = None
        self._syncs = 0

    # -- start and stop ----------------------------------------------------------------------------------------

    def start(self, context: EngineContext) -> None:
        """Waits for the servers and checks how they sample."""
        from transformers import AutoConfig, AutoTokenizer

        if context.images_per_prompt:
            raise SettingError(
                "data.engine is ServerEngine, which sends no images, but data.task has some; use "
                "popo_lightning.engines.vllm.engine.VLLMEngine"
            )
        self._context = context
        self._tokenizer: Any = AutoTokenizer.from_pretrained(context.folder)
        self._vocabulary = int(AutoConfig.from_pretrained(context.folder).get_text_config().vocab_size)
        self._stop_token_ids = end_token_ids(context.folder, self._tokenizer)
        self._run = all_gather_object(uuid.uuid4().hex[:12])[0]
        if context.rank == 0:
            warn_of_open(self.pool.servers)
            self._temporary = tempfile.TemporaryDirectory(prefix="popo-weights-")
            self._root = Path(self.weights_folder or self._temporary.name) / f"popo-{self._run}"
        self._wait_for_servers()
        for server in self.pool.alive:
            check_version(server)
            check(server, context)

    def _wait_for_servers(self) -> None:
        ends = time.monotonic() + self.start_seconds
        missing = self.pool.servers
        while missing := [server for server in missing if not server.answers()]:
            if time.monotonic() > ends:
                break
            time.sleep(1.0)
            for server in missing:
                server.forget_probe()
        for server in missing:
            self.pool.drop(server, f"it has not answered within {self.start_seconds:g} s (data.engine.start_seconds)")
        if not self.pool.alive:
            raise SettingError(
                f"none of data.engine.urls answers ({', '.join(server.url for server in self.pool.servers)}); start "
                "servers with scripts/serve.sh"
            )

    def stop(self) -> None:
        """Leaves the servers running."""
        if hasattr(self, "_temporary"):
            self._temporary.cleanup()

    # -- responses ---------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        """See :class:`RolloutEngine`. Sends one request per prompt, or per response with a temperature spread."""
        if self._label is None:
            raise RuntimeError("the servers have no weights of this run yet")
        copies = n if sampling.temperature == 0 else 1  # vLLM refuses to write the same greedy response n times
        jobs = []
        for each in (requests := asks(len(prompts), n // copies, sampling, seed)):
            prompt = prompts[each.place]
            if prompt.images:
                raise SettingError("data.engine is ServerEngine, which sends no images")
            asked = Asked(
                prompt_ids=prompt.ids.tolist(),
                n=each.n,
                limit=sampling.max_new_tokens - prompt.prefix_len,
                ends=self._stop_token_ids,
                forbidden=self._context.forbidden_token_ids,
                vocabulary=self._vocabulary,
                label=self._label,
                stop=StopStrings(self._tokenizer, sampling.stop),
            )
            jobs.append((asked, sampling, each))
        found: list[list[Sampled]] = [[] for _ in prompts]
        temperatures: list[list[float]] = [[] for _ in prompts]  # none without a spread
        for each, answer in zip(requests, self.pool.map(self._ask, jobs), strict=True):
            found[each.place] += answer
            temperatures[each.place] += [each.temperature] if sampling.temperature_spread else []
        of_prompts = zip(found, temperatures, strict=True)
        return [responses_of(self._tokenizer, of, sampling.stop, own) * copies for of, own in of_prompts]

    def _ask(self, server: Server, job: tuple[Asked, Sampling, Ask]) -> list[Sampled]:
        asked, sampling, each = job
        settings = request_settings(each, sampling, asked.limit, asked.ends, asked.forbidden)
        body = {"token_ids": asked.prompt_ids, "return_token_ids": True, "sampling_params": settings}
        most = 2**16 + 16 * len(asked.prompt_ids) + 512 * asked.n * asked.limit
        seconds = self._longest_wait(asked)
        return sampled(server.ask("POST", "/inference/v1/generate", body, seconds, most), asked)

    def _longest_wait(self, asked: Asked) -> float:
        """Maximum wait for one prompt's responses, while a server works on as many prompts as it may be given."""
        if self.request_seconds is not None:
            return self.request_seconds
        return MIN_SECONDS + asked.limit * asked.n * self.pool.per_server / SLOW_TOKENS_PER_SECOND

    # -- weights -----------------------------------------------------------------------------------------------

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Sends the weights to all servers, dropped ones included, and checks their version.

        A collective: no rank may still be sampling, and all ranks continue with the same servers.
        """
        all_gather_object(None)
        self._syncs += 1
        label = f"{self._run}-{self._syncs}-{version}"
        reached: list[str] = []
        failure: str | None = None
        folder = self._root / str(self._syncs) if self._context.rank == 0 else None
        try:
            write_weights(self._context.as_saved(weights), folder)
            if folder is not None:
                reached = self._send(folder, label)
        except (OSError, RuntimeError) as error:  # all ranks get the failure, or they would wait for this one
            failure = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        finally:
            if folder is not None:
                shutil.rmtree(self._root, ignore_errors=True)
        reached, failure = all_gather_object((reached, failure))[0]
        if failure is not None or not reached:
            raise RuntimeError(f"the servers did not take the policy's weights: {failure or 'none of them answers'}")
        for server in self.pool.servers:
            server.alive = server.url in reached
        self._label, self.version = label, version

    def forget_prompts(self) -> None:
        """Drops the servers' cached prefixes, and servers that do not answer. A collective, like update_weights."""
        all_gather_object(None)
        left: list[str] = []
        failure: str | None = None
        if self._context.rank == 0:
            try:
                left = [server.url for server in self.pool.alive if self._forgets(server)]
            except RuntimeError as error:  # all ranks get the failure, or they would wait for this one
                failure = str(error)
        left, failure = all_gather_object((left, failure))[0]
        if failure is not None or not left:
            raise RuntimeError(f"the servers did not drop their cached prefixes: {failure or 'none of them answers'}")
        for server in self.pool.alive:
            if server.url not in left:
                self.pool.drop(server, "rank 0 has left it out")

    def _forgets(self, server: Server) -> bool:
        try:
            server.reset_caches()
        except ServerFailedError as error:
            self.pool.drop(server, error)
            return False
        return True

    def _send(self, folder: Path, label: str) -> list[str]:
        """Urls of the servers that have the weights; servers that do not answer are left out."""
        with ThreadPoolExecutor(len(self.pool.servers)) as executor:
            sent = list(executor.map(partial(self._send_to, folder, label), self.pool.servers))
        return [server.url for server, done in zip(self.pool.servers, sent, strict=True) if done]

    def _send_to(self, folder: Path, label: str, server: Server) -> bool:
        server.forget_probe()
        try:
            if not server.answers():
                raise ServerFailedError("it does not answer")
            server.ask("POST", "/update_weight_version", {"new_version": LOADING})
            found = call(server, "load_policy", {"folder": str(folder.absolute())}, self.sync_seconds)
            for worker in found:
                if "error" in worker or not worker.get("files"):
                    raise RuntimeError(f"{server.url}: {str(worker.get('error', worker))[:500]}")
            server.reset_caches()
            server.ask("POST", "/update_weight_version", {"new_version": label})
            said = server.ask("GET", "/weight_info")
        except ServerFailedError as error:
            self.pool.drop(server, error)
            return False
        if not isinstance(said, dict) or said.get("weight_version") != label:
            raise RuntimeError(f"{server.url} says that it has weights {str(said)[:100]} instead of {label}")
        return True


def _server(url: str) -> Server:
    try:
        return Server(url)
    except ValueError as error:
        raise SettingError(
            f"data.engine.urls has '{url}'; write addresses of servers such as http://127.0.0.1:8000"
        ) from error
