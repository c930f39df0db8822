"""A fake vLLM for VLLMEngine: it records its calls and samples nothing."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from popo_lightning.engines.base import EngineContext
from popo_lightning.engines.vllm.engine import VLLMEngine

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Recorder:
    """Stands in for the class vllm.LLM. It lists its calls in order, for any number of engines."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.environment: dict[str, str] = {}
        self.calls: list[str] = []
        self.seeds: list[int] = []
        self.steps = 0  # that the next requests take
        self.threads: list[int] = []  # of torch, in each step
        self.during_start: Callable[[], None] = lambda: None
        self.allocated = self.peak = 0  # bytes that torch counts
        self.segments: list[dict[str, int]] = []
        self.allocations: dict[int, SimpleNamespace] = {}  # vLLM's

    def __call__(self, **arguments: Any) -> Recorder:
        self.arguments = arguments
        self.environment = {name: os.environ[name] for name in RANKS if name in os.environ}
        # what the start of vLLM does to a process
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        torch.set_float32_matmul_precision("medium")
        gc.freeze()
        self.during_start()
        return self

    # -- the GPU's memory, as torch and vLLM's allocator know it --------------------------------------------------

    def takes(self, tag: str, size: int, segment: int) -> None:
        """Allocates memory that sleeps and wakes with a tag, in a segment that may be larger."""
        address = 1000 * (len(self.segments) + 1)
        self.segments.append({"address": address, "allocated_size": size, "total_size": segment})
        self.allocations[address] = SimpleNamespace(tag=tag, is_asleep=False, handle=(0, segment, address, 0))
        self.trains_with(size, kept=True)

    def trains_with(self, size: int, kept: bool = False) -> None:
        """Allocates other memory, and frees it again unless it is kept."""
        self.peak = max(self.peak, self.allocated + size)
        self.allocated += size * kept

    def reset(self) -> None:
        self.peak = self.allocated

    # -- what VLLMEngine calls ---------------------------------------------------------------------------------

    def get_tokenizer(self) -> None:
        return None

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        for data in self.allocations.values():
            data.is_asleep = True

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")
        for data in self.allocations.values():
            data.is_asleep &= data.tag not in tags

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append("reload " + " ".join(f"{float(weight):g}" for _, weight in kwargs["weights_iterator"]))

    def reset_prefix_cache(self) -> bool:
        return True

    def apply_model(self, function: Any) -> None:
        pass

    def enqueue(self, inputs: list[Any], parameters: list[Any], use_tqdm: bool) -> list[str]:
        self.calls.append("generate")
        self.seeds += [one.seed for one in parameters]
        return [str(place) for place in range(len(inputs))]

    def step(self) -> list[Any]:
        self.steps -= 1
        self.threads.append(torch.get_num_threads())
        return []

    @property
    def llm_engine(self) -> Any:
        return SimpleNamespace(
            has_unfinished_requests=lambda: self.steps > 0, step=self.step, abort_request=lambda ids: None
        )


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Replaces vllm.LLM, in a process without started ranks and with four GPUs of 24 GiB, whose memory is its own."""
    vllm = pytest.importorskip("vllm")
    recorder = Recorder()
    monkeypatch.setattr(vllm, "LLM", recorder)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: recorder.calls.append(f"device {index}"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: recorder.calls.append("empty cache"))
    card = SimpleNamespace(total_memory=24 * 2**30, name="NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: recorder.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: recorder.reset())
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: recorder.segments)
    pool = SimpleNamespace(pointer_to_data=recorder.allocations)
    monkeypatch.setattr("vllm.device_allocator.get_mem_allocator_instance", lambda: pool)
    return recorder


def started(device: str = "cuda:3", **settings: Any) -> VLLMEngine:
    """Starts an engine on a device that need not exist."""
    of_context = ("rank", "world_size", "local_rank", "responses")
    ranks = {name: settings.pop(name) for name in of_context if name in settings}
    engine = VLLMEngine(**settings)
    known = {"rank": 0, "world_size": 1} | ranks
    engine.start(EngineContext("no folder", torch.device(device), torch.float32, max_tokens=64, **known))
    return engine
