"""Two real vLLM servers on loopback: the tests of engines run through them, and so does a training."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.places import REPOSITORY
from helpers.stops import common
from helpers.tiny_models import attached, method, metrics, popo

from engines.test_engines import (  # noqa: F401  # collected here again, with the pair of this file
    FORBIDDEN,
    LIMIT,
    TOLERANCE,
    Pair,
    test_a_prompt_draws_the_same_whatever_is_asked_beside_it,
    test_ends,
    test_engines_stop_alike,
    test_forbidden_tokens,
    test_greedy,
    test_log_probs_at_a_temperature,
    test_log_probs_before_and_after_updates,
    test_prefix_cache_is_dropped,
    test_random_states_are_left_alone,
    test_seeds,
    test_shape_and_order,
)
from popo_lightning.engines.base import EngineContext, Sampling
from popo_lightning.engines.servers.engine import ServerEngine
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.policy import PolicyModule

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]
MAX_TOKENS, START_SECONDS = 400, 400


@pytest.fixture(scope="module")
def folder(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the tiny policy's folder, with a context as long as these tests need."""
    copy = tmp_path_factory.mktemp("served") / "policy"
    shutil.copytree(policy, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return copy


@pytest.fixture(scope="module")
def urls(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    logs = tmp_path_factory.mktemp("logs")
    ports = [_free_port() for _ in range(2)]
    # Compiling vLLM's samplers would need time and a C++ compiler.
    environment = os.environ | {"PYTHON": sys.executable, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    servers = []
    for port in ports:
        command = [REPOSITORY / "scripts" / "serve.sh", folder, port, MAX_TOKENS, "float32", "--enforce-eager"]
        with (logs / str(port)).open("w") as log:
            servers.append(
                subprocess.Popen(
                    list(map(str, command)), env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
    found = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        ends = time.monotonic() + START_SECONDS
        while not all(map(_answers, found)):
            assert time.monotonic() < ends and all(s.poll() is None for s in servers), "\n".join(
                path.read_text(errors="replace")[-2000:] for path in logs.iterdir()
            )
            time.sleep(1)
        yield found
    finally:
        for server in servers:
            with contextlib.suppress(ProcessLookupError):  # a server that never started
                os.killpg(server.pid, signal.SIGTERM)
        for server in servers:
            server.wait(60)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def pair(folder: Path, urls: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Yields a pair of the served shape with random, peaked weights, so wrong log-probs differ much from right ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    random = tmp_path_factory.mktemp("random") / "policy"
    shutil.copytree(folder, random)
    config = AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(random)
    module = attached(PolicyModule(path=str(random)))
    module.forbidden_token_ids = FORBIDDEN
    engine = ServerEngine(urls)
    engine.start(EngineContext(random, torch.device("cpu"), torch.float32, 0, 1, MAX_TOKENS, FORBIDDEN))
    engine.update_weights(module.named_weights(), 0)
    yield Pair(engine, module)
    engine.stop()
    assert all(map(_answers, urls)), "servers outlive the trainer"


@pytest.fixture(scope="module")
def colocated(pair: Pair) -> Iterator[Pair]:
    """Yields vLLM in this process with the same model."""
    folder = pair.policy.folder
    engine = VLLMEngine(cpu_cache_gib=0.25)
    engine.start(EngineContext(folder, torch.device("cpu"), torch.float32, 0, 1, MAX_TOKENS, FORBIDDEN))
    yield Pair(engine, pair.policy)
    engine.stop()


@pytest.mark.parametrize(("temperature", "length"), [(1.0, 1), (1.0, 2), (0.0, 1)])
def test_stop_strings_end_responses_as_in_this_process(
    pair: Pair, colocated: Pair, temperature: float, length: int
) -> None:
    """Tokens, text and finish reason are the same. Log-probs differ only by the batches of the kernels."""
    for engine in (pair.engine, colocated.engine):
        engine.update_weights(pair.policy.named_weights(), 1000)
    free = pair.generate(Sampling(LIMIT, temperature), n=8)
    stopping = Sampling(LIMIT, temperature, stop=(common(free, length), "no such text"))
    ends = []
    for whole, *both in zip(free, pair.generate(stopping, n=8), colocated.generate(stopping, n=8), strict=True):
        for before, served, here in zip(whole, *both, strict=True):
            assert served.token_ids.tolist() == here.token_ids.tolist()
            assert (served.text, served.finish_reason) == (here.text, here.finish_reason)
            assert torch.allclose(served.behave_logp, here.behave_logp, rtol=0, atol=TOLERANCE)
            ends.append((len(served.token_ids) < len(before.token_ids), served.finish_reason))
    assert (True, "stop") in ends and (temperature == 0 or (False, "length") in ends)


def test_training(config: Path, folder: Path, urls: list[str], tmp_path: Path) -> None:
    scale = ["--config", str(REPOSITORY / "configs" / "scale" / "servers.yaml")]
    engine = [*scale, "--data.engine.urls", json.dumps(urls)]
    model = ["--model.warm_start", "null", "--model.path", folder]
    short = ["--trainer.max_epochs", "2", "--run.folder", tmp_path]
    popo("fit", "--config", config, *method("popo"), *engine, *model, *short)
    rows = [row for row in metrics(tmp_path) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert max(row["engine/logp_gap_max"] for row in rows) < 1e-4
    assert all(0 < row["rollout/effective_share"] < 1 for row in rows)
    assert any("eval/reward" in name or name.startswith("eval/") for row in metrics(tmp_path) for name in row)
    assert all(map(_answers, urls)), "servers outlive the trainer"
