"""Runs a function on two ranks of this machine, joined over gloo, and trains a policy there on given minibatches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.multiprocessing
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.forked import fork_server, take_environment, variables_of
from helpers.groups import group
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.ranks import full_tensor
from popo_lightning.model.sharding import settle_strategy
from popo_lightning.policy import PolicyModule


def on_two_ranks(function: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = 120) -> list[Any]:
    """Returns what function(*arguments) returns on each of two ranks, as if torchrun had started them.

    Args:
        function: A function at the top level of a module.
        folder: Folder for the returned values.
        arguments: Arguments of the function.
        seconds: Time after which ranks that still run are killed and the test fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fork_server()
    environments = [os.environ | more for more in variables_of(2)]
    context = torch.multiprocessing.start_processes(
        _rank, (function, folder, arguments, environments), nprocs=2, join=False, start_method="forkserver"
    )
    if not context.join(timeout=seconds, grace_period=1):
        # one rank has ended, or none has
        done = context.join(timeout=seconds, grace_period=1)
        if not done:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"the ranks had not ended after {seconds} seconds")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _rank(
    rank: int,
    function: Callable[..., Any],
    folder: Path,
    arguments: tuple[Any, ...],
    environments: Sequence[dict[str, str]],
) -> None:
    take_environment(environments[rank] | {"OMP_NUM_THREADS": "1"})
    torch.save(function(*arguments), folder / f"rank{rank}.pt")


def rows_of(seed: int, prompts: Sequence[int], version: int = 2, index: int = 0) -> Minibatch:
    """Makes a group for each prompt length, with three responses of the given lengths."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(1, 16, (length,), generator=draw)

    groups = []
    for id, prompt in enumerate(prompts):
        lengths = torch.randint(1, 9, (3,), generator=draw).tolist()
        answers = [
            Response(tokens(n), -3 * torch.rand(n, generator=draw), "stop", "", {"score": float(i), "acc": 0.0})
            for i, n in enumerate(lengths)
        ]
        groups.append(Group(id, group(id).problem, tokens(prompt), answers, version=version - id % 2))
    return Minibatch(groups, version=version, index=index)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "fsdp2": ModelParallelStrategy,
    "one": lambda: "auto",
}


def trainer_of(
    strategy: str, ranks: int, steps: int, callbacks: Sequence[L.Callback] = (), **settings: Any
) -> L.Trainer:
    """Returns a trainer that trains on CPUs and writes nothing."""
    usual = {"accelerator": "cpu", "devices": ranks, "max_epochs": 1, "limit_train_batches": steps}
    usual |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = usual | {"enable_model_summary": False, "use_distributed_sampler": False} | settings
    trainer = L.Trainer(strategy=STRATEGIES[strategy](), callbacks=list(callbacks), **settings)
    settle_strategy(trainer.strategy, ranks)
    return trainer


def train(
    module: PolicyModule,
    strategy: str,
    minibatches: Sequence[Sequence[Minibatch]],
    callbacks: Sequence[L.Callback] = (),
) -> tuple[PolicyModule, L.Trainer]:
    """Trains each rank on its own minibatch at each step.

    Args:
        module: The policy with its settings.
        strategy: A key of STRATEGIES.
        minibatches: For each step, one minibatch for each rank.
        callbacks: Callbacks of the trainer.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), 1 if strategy == "one" else 2
    trainer = trainer_of(strategy, ranks, len(minibatches), callbacks)
    own = [step[rank] for step in minibatches]
    trainer.fit(module, torch.utils.data.DataLoader(own, batch_size=None, num_workers=0))
    return module, trainer


def whole_tensors(named: Any) -> dict[str, torch.Tensor]:
    """Returns copies by name and gathers split tensors. This is a collective."""
    return {name: full_tensor(tensor.detach()).clone() for name, tensor in named}


class Steps(L.Callback):
    """Keeps the gradients, outputs and collectives of each optimizer step, and what is left of the gradients."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.outputs: list[dict[str, Any]] = []
        self.left: list[str] = []  # state of the gradients after the step: none, cleared or some
        self.sent: list[list[tuple[str, int]]] = []  # collectives of a step, with the number of values in each
        self._spy: Collectives | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        self._spy = Collectives()
        self._spy.__enter__()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(
            whole_tensors((name, p.grad) for name, p in pl_module.named_parameters() if p.requires_grad)
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        assert self._spy is not None
        self._spy.__exit__(None, None, None)
        self.sent.append(self._spy.seen)
        kept = {name: outputs[name] for name in ("mean_loss", "grad_norm", "stepped", "value_loss") if name in outputs}
        self.outputs.append(kept)
        left = [full_tensor(p.grad) for p in pl_module.parameters() if p.grad is not None]
        self.left.append("some" if any(bool(each.any()) for each in left) else "cleared" if left else "none")


class Collectives(TorchDispatchMode):
    """Lists the collectives that are called and the number of values in each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = torch.utils._pytree.tree_leaves(args)
            numbers = sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
            self.seen.append((func.__name__.split(".")[0], numbers))
        return func(*args, **(kwargs or {}))
