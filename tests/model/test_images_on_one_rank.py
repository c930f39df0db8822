"""With DDP on one device a vision tower takes part in every pass. Otherwise DDP would wait for its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from helpers.pictures import asked, minibatch_groups, picture
from helpers.tiny_models import random_vision_model, weights_of
from lightning.pytorch.strategies import DDPStrategy

from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.sharding import settle_strategy
from popo_lightning.policy import PolicyModule


def groups_of(folder: Path) -> list[Group]:
    """Returns a group with an image and one without."""
    problems = asked("one", "<image>1+2", picture(84, 56, 1)), asked("text", "3*4")
    return minibatch_groups(folder, problems)


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


def test_ddp_on_one_device_trains_as_no_strategy_does(tmp_path: Path, no_process_group: None) -> None:
    """This holds with or without an image in a step's last micro-batch, whose backward pass exchanges gradients."""
    folder = random_vision_model(tmp_path)
    seen, text = groups_of(folder)
    minibatches = [Minibatch([seen, text], 0, 0), Minibatch([text], 0, 1), Minibatch([text, seen], 0, 2)]
    plain, passes = trained(folder, "auto", minibatches)
    assert True in passes and False in passes
    ddp, _ = trained(folder, DDPStrategy(process_group_backend="gloo"), minibatches)
    torch.testing.assert_close(weights_of(ddp), weights_of(plain), atol=1e-6, rtol=0)
