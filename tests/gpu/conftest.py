"""Fixtures for tests that need a CUDA device: pytest -m gpu. POPO_TEST_DEVICE=cpu runs them on the CPU to try them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("POPO_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Returns the device of the tests. They are skipped if it does not exist."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here; POPO_TEST_DEVICE=cpu runs this on the CPU")
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture
def on_device(device: torch.device) -> list[str | Path]:
    """Returns settings of popo for a run on the device, with deterministic algorithms if torch has them."""
    if device.type == "cpu":
        return ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    return ["--trainer.accelerator", "gpu", "--trainer.devices", "[0]", "--trainer.deterministic", "warn"]
