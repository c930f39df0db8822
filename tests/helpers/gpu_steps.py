"""One optimizer step on minibatches made by hand, on any device: its outputs and how it moves the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.groups import group
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.policy import PolicyModule

TOKENS = 15  # the vocabulary of the tiny models is larger


@dataclass
class Step:
    """Log-probs (T,) of each row before the step, gradients by parameter name, and the step's outputs."""

    logp: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


class Watch(L.Callback):
    """Fills a Step. The optimizer is SGD with learning rate 1 and no clipping, so weights move by the gradient."""

    def __init__(self, step: Step, minibatch: Minibatch) -> None:
        self.step, self.minibatch = step, minibatch

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.step.logp = pl_module.logprobs(self.minibatch)
        self.before = {name: weight.detach().clone() for name, weight in pl_module.model.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *others: Any) -> None:
        self.step.outputs = outputs
        after = pl_module.model.named_parameters()
        self.step.gradients = {name: (self.before[name] - weight.detach()).cpu() for name, weight in after}


def one_step(
    folder: Path, device: torch.device, minibatch: Minibatch, precision: str = "32-true", **model: Any
) -> Step:
    """Trains on one minibatch with Trainer.fit on the device."""
    module = PolicyModule(path=str(folder), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_grad_norm=None, **model)
    step = Step()
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        callbacks=[Watch(step, minibatch)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([minibatch], batch_size=None))  # type: ignore[arg-type]
    return step


def some_groups(prompts: tuple[int, ...], responses: tuple[int, ...], seed: int = 1) -> Minibatch:
    """Makes a group for each prompt length, with a response of each length. Scores are 0 and 1 in turn."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(length: int) -> Tensor:
        return torch.randint(1, TOKENS, (length,), generator=draw)

    groups = []
    for id, prompt in enumerate(prompts):
        answers = [
            Response(drawn(n), -3 * torch.rand(n, generator=draw), "stop", "", {"score": float(i % 2), "acc": 0.0})
            for i, n in enumerate(responses)
        ]
        groups.append(Group(id, group(id).problem, drawn(prompt), answers, version=0))
    return Minibatch(groups, version=0, index=0)


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))
