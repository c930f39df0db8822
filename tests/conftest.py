"""One tiny policy for the whole session, in a cache of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tiny_models, for tests and for what the command line instantiates

from helpers.machine import hide_gpus, skip_without_vllm_on_a_cpu
from helpers.tiny_models import effective_share, tiny_policy, write_config

from popo_lightning.verifiers.math import MathVerifier


def pytest_configure(config: pytest.Config) -> None:
    hide_gpus(config.option.markexpr, os.environ)


@pytest.hookimpl(tryfirst=True)  # before fixtures start an engine
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm"):
        skip_without_vllm_on_a_cpu()


@pytest.fixture(scope="session", autouse=True)
def quiet_process() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs and nohup ignore them, and so would the
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # processes that tests start and stop
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the models are so small that threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches of this session: no test leans on what an earlier one left, or leaves anything in the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPO_CACHE", str(folder))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        if "datasets" in sys.modules:  # which has read it already
            patch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="session")
def policy(cache: Path) -> Path:
    """Folder of the tiny policy. Some of its groups are effective and some are not, or tests would test nothing."""
    folder = tiny_policy().folder()
    share = effective_share(folder)
    assert 0.3 < share < 0.9, f"{share:.0%} of the tiny policy's groups are effective"
    return folder


@pytest.fixture(scope="session")
def config(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task configuration around the tiny policy, with the transformers engine."""
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture
def verifier() -> MathVerifier:
    """For tests that have none of their own."""
    return MathVerifier()
