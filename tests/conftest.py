"""Fixtures for all tests: quiet processes, a cache for the session, and one tiny policy in it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))  # where tests and the command line find tiny_models

from helpers.machine import hide_gpus, skip_without_vllm_on_a_cpu
from helpers.places import POLICIES
from helpers.tiny_models import tiny_policy, write_config

from popo_lightning.verifiers.math import MathVerifier


def pytest_configure(config: pytest.Config) -> None:
    hide_gpus(config.option.markexpr, os.environ)


@pytest.hookimpl(tryfirst=True)  # before fixtures start an engine
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm"):
        skip_without_vllm_on_a_cpu()


@pytest.fixture(scope="session", autouse=True)
def quiet_process() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs with & and nohup start with these signals
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, and so would the processes of the tests
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the models are so small that threads would only wait for each other


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gives the session its own caches, so that no test depends on an earlier session or changes the user's caches."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPO_CACHE", str(folder))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        if "datasets" in sys.modules:  # datasets has read the variable already
            patch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="session")
def policy(cache: Path) -> Path:
    """Returns the folder of the tiny policy, whose weights are the same on every machine (see ship_tiny_policy.py)."""
    shutil.copytree(POLICIES, cache, dirs_exist_ok=True)
    assert tiny_policy().place().exists(), "the recipe is another one: run helpers/ship_tiny_policy.py"
    return tiny_policy().folder()


@pytest.fixture(scope="session")
def config(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a task configuration with the tiny policy and the transformers engine."""
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture
def verifier() -> MathVerifier:
    """Serves tests that do not need a verifier of their own."""
    return MathVerifier()


@pytest.fixture
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes a launcher's environment and leaves no process group."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
