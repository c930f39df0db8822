"""Tests of what only a CUDA device shows: pytest -m gpu. POPO_TEST_DEVICE=cpu runs them on the CPU, to try them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("POPO_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute; without one they are skipped."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here; POPO_TEST_DEVICE=cpu runs this on the CPU")
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture
def on_device(device: torch.device) -> list[str | Path]:
    """Settings of popo that put a run there, in deterministic algorithms where torch has them."""
    if device.type == "cpu":
        return ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    return ["--trainer.accelerator", "gpu", "--trainer.devices", "[0]", "--trainer.deterministic", "warn"]
