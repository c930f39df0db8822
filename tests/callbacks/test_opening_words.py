"""Sentences at the beginning of a run: the hint about a busy machine."""

from __future__ import annotations

import os

import pytest
import torch

from popo_lightning.callbacks.opening_words import other_work


@pytest.mark.parametrize(
    ("device", "threads", "load", "told"),
    [("cpu", 2, 4.0, True), ("cpu", 2, 1.5, False), ("cpu", 1, 4.0, False), ("cuda", 2, 4.0, False)],
)
def test_threads_beside_other_work(
    device: str, threads: int, load: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    said = other_work(device)
    assert (said is not None) == told
    assert said is None or ("a load of 4.0 on 2 cores" in said and "OMP_NUM_THREADS=1" in said)
