"""With DDP on one device a vision tower takes part in every pass. Otherwise DDP would wait for its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers.groups import group
from helpers.pictures import asked, picture
from helpers.tiny_models import random_vision_model, weights_of
from lightning.pytorch.strategies import DDPStrategy

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.model.sharding import settle_strategy
from popo_lightning.policy import PolicyModule


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes a launcher's environment and leaves no process group."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def groups_of(folder: Path) -> list[Group]:
    """Returns a group with an image and one without."""
    encoder, found = PromptEncoder(folder, 100), []
    draw = torch.Generator().manual_seed(0)
    for id, problem in enumerate((asked("one", "<image>1+2", picture(84, 56, 1)), asked("text", "3*4"))):
        prompt = encoder.encode(problem)
        answers = [
            Response(torch.randint(2, 12, (4,), generator=draw), -torch.ones(4), "stop", "", {"score": s, "acc": s})
            for s in (0.0, 1.0, 1.0)
        ]
        found.append(Group(id, group(id).problem, prompt.ids, answers, 0, prompt.images))
    return found


def trained(folder: Path, strategy: Any, minibatches: Sequence[Minibatch]) -> tuple[PolicyModule, list[bool]]:
    """Returns the policy, and whether each pass of the first minibatch had images."""
    torch.manual_seed(0)
    module = PolicyModule(str(folder), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), micro_batch_tokens=12)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    settle_strategy(trainer.strategy, 1)
    trainer.fit(module, torch.utils.data.DataLoader(list(minibatches), batch_size=None, num_workers=0))
    return module, [bool(part.images) for part in module._passes(minibatches[0], minibatches[0].rows())]


def test_ddp_on_one_device_trains_as_no_strategy_does(tmp_path: Path, alone: None) -> None:
    """This holds with or without an image in a step's last micro-batch, whose backward pass exchanges gradients."""
    folder = random_vision_model(tmp_path)
    seen, text = groups_of(folder)
    minibatches = [Minibatch([seen, text], 0, 0), Minibatch([text], 0, 1), Minibatch([text, seen], 0, 2)]
    plain, passes = trained(folder, "auto", minibatches)
    assert True in passes and False in passes
    ddp, _ = trained(folder, DDPStrategy(process_group_backend="gloo"), minibatches)
    torch.testing.assert_close(weights_of(ddp), weights_of(plain), atol=1e-6, rtol=0)
