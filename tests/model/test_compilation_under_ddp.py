"""What is compiled is one graph within a pass of DDP, which older versions of torch refuse to split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.distributed as dist
from helpers.tiny_models import random_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from popo_lightning.model import attention
from popo_lightning.model.loading import compile_layers, load_model, load_trainable


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = True  # the default
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.config.optimize_ddp = before
    torch._dynamo.reset()


def graphs() -> int:
    """Compiles a module of several DDP buckets within a pass, and returns the number of graphs."""
    found: list[Any] = []

    def counts(graph: Any, inputs: Any) -> Callable[..., Any]:
        found.append(graph)
        run: Callable[..., Any] = graph.forward
        return run

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(4))

        def forward(self, states: Tensor) -> Tensor:
            for part in self.parts:
                states = part(states)
            return states

    layer = Layer()
    layer.compile(backend=counts)
    torch._dynamo.reset()
    DistributedDataParallel(layer, bucket_cap_mb=1)(torch.randn(2, 1024, requires_grad=True))
    return len(found)


def test_torch_would_split() -> None:
    assert graphs() > 1


@pytest.mark.parametrize("what", ["layers", "packed", "flex_attention"])
def test_nothing_is_split(what: str, tmp_path: Path) -> None:
    folder = random_model("llama-tied", tmp_path)
    if what == "layers":
        compile_layers(load_model(folder, torch.float32))
    elif what == "packed":
        attention._compiled_flex.cache_clear()
        attention._compiled_flex()
    else:
        load_trainable(folder, torch.float32, freeze_vision=False, attention="flex_attention")
    assert graphs() == 1
