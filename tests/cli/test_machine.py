"""How the tests behave on a machine with GPUs, which is emulated."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.machine import hide_gpus, skip_without_vllm_on_a_cpu

from popo_lightning.cli.trainer_settings import chosen_accelerator
from popo_lightning.engines.vllm import process as vllm_process


@pytest.mark.parametrize(
    ("markers", "hidden"),
    [("not slow and not gpu", True), ("slow", True), ("", True), ("gpu", False), ("slow or gpu", False)],
)
def test_gpus_are_hidden_unless_asked_for(markers: str, hidden: bool) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    hide_gpus(markers, environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0,1")


def test_they_are_hidden_here() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_vllm_tests_are_skipped_with_a_reason_where_vllm_samples_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    platforms = pytest.importorskip("vllm.platforms")
    monkeypatch.setattr(platforms.current_platform, "device_type", "cuda")
    with pytest.raises(pytest.skip.Exception, match="samples on cuda"):
        skip_without_vllm_on_a_cpu()
    monkeypatch.setattr(platforms.current_platform, "device_type", "cpu")
    skip_without_vllm_on_a_cpu()


@pytest.mark.vllm
def test_the_marker_asks_first() -> None:
    vllm_process.check_platform(torch.device("cpu"))  # raises if the marker wrongly let this test run


@pytest.mark.parametrize(
    ("setting", "with_gpu", "without"), [("auto", "cuda", "cpu"), ("cpu", "cpu", "cpu"), ("cuda", "cuda", None)]
)
def test_the_accelerator(setting: str, with_gpu: str, without: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS is never chosen, even if Lightning would choose it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_accelerator(setting) == with_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if without is not None:
        assert chosen_accelerator(setting) == without
