"""A checkpoint from before the first optimizer step changes nothing of a sharded run, and resumes bit for bit.

torch makes the state of an optimizer that has none by a step with gradients of zero, in order to save it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.processes import rows_of, trainer_of, whole_tensors
from helpers.tiny_models import random_model
from torch.utils.data import DataLoader, IterableDataset

from popo_lightning.callbacks.checkpoints import Checkpoints
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.policy import PolicyModule

EPOCHS = [Minibatch([], 2, 0), rows_of(1, [2, 7]), rows_of(2, [4])]  # the first takes no step


class Noisy(torch.optim.AdamW):
    """Draws random numbers, and counts its steps in its settings."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                parameter.mul_(1 + group["lr"] * group["count"] * float(torch.rand(())))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),  # has its state from the start
    "noisy": lambda p: Noisy(p, lr=1e-2),
}


class ByEpoch(IterableDataset[Minibatch]):
    """Gives each epoch its minibatch."""

    trainer: L.Trainer

    def __iter__(self) -> Iterator[Minibatch]:
        yield EPOCHS[self.trainer.current_epoch]


class Watch(L.Callback):
    """Keeps the number of parameters with state in the optimizer after each epoch's checkpoint."""

    def __init__(self) -> None:
        self.states: list[int] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.states.append(len(trainer.optimizers[0].state))


def trained(
    model: Path,
    optimizer: str,
    checkpoints: Path | None = None,
    resumed: Path | None = None,
    strategy: str = "fsdp2",
    whole: bool = False,
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Returns the weights at the end, and the number of parameters with optimizer state at the start of each epoch."""
    torch.manual_seed(0)
    module = PolicyModule(path=str(model), optimizer=OPTIMIZERS[optimizer])
    watch, steps = Watch(), ByEpoch()
    kept = [] if checkpoints is None else [Checkpoints(dirpath=checkpoints, save_top_k=-1, every_n_epochs=1)]
    settings = {"max_epochs": len(EPOCHS), "enable_checkpointing": bool(kept)}
    steps.trainer = trainer = trainer_of(strategy, 1, 1, [*kept, watch], **settings)
    vars(trainer.strategy)["_save_distributed_checkpoint"] = not whole
    trainer.fit(module, DataLoader(steps, batch_size=None, num_workers=0), ckpt_path=resumed)
    return whole_tensors(module.named_parameters()), watch.states


@pytest.mark.parametrize(("optimizer", "whole"), [*((name, False) for name in OPTIMIZERS), ("adamw", True)])
def test_a_save_before_the_first_step_changes_nothing(
    optimizer: str, whole: bool, tmp_path: Path, no_process_group: None
) -> None:
    model, saved = random_model("llama-tied", tmp_path / "model"), tmp_path / "saved"
    never, without = trained(model, optimizer)
    found, states = trained(model, optimizer, saved, whole=whole)
    assert states == without and (states[1] == 0) == (optimizer != "adagrad")
    assert all(torch.equal(found[name], weight) for name, weight in never.items())
    start = saved / "iteration-0001.ckpt"
    if optimizer == "noisy":
        return  # a run's random numbers are not saved
    resumed, states = trained(model, optimizer, resumed=start)
    assert states == without[1:]
    assert all(torch.equal(resumed[name], weight) for name, weight in never.items())
    if whole:
        elsewhere, states = trained(model, optimizer, resumed=start, strategy="one")
        assert states == without[1:]
        torch.testing.assert_close(elsewhere, never, atol=1e-6, rtol=0)
