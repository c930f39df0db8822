"""The optimizer over policy and critic: fused unless a setting says otherwise, with its settings on resumption."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L
import torch
from torch.optim import Adam, Optimizer

from popo_lightning.core.errors import SettingError, reason

GroupSettings = dict[str, Any]
UNSTEPPED = "optimizers_without_state"  # indices; what the checkpoint holds of them has no meaning


def fuse(optimizer: Optimizer) -> None:
    """Sets Adam and AdamW to fused, unless the settings say how to compute them.

    Otherwise a step needs another 4 bytes per parameter on a GPU, and takes three to seven times as long on a CPU.
    """
    if not isinstance(optimizer, Adam):  # AdamW is one
        return
    for group in (optimizer.defaults, *optimizer.param_groups):
        undecided = group["fused"] is None and group["foreach"] is None
        if undecided and not group["capturable"] and not group["differentiable"]:
            group["fused"] = True


def check_optimizer(make: Callable[..., Optimizer], make_scheduler: Callable[..., Any] | None) -> None:
    """Raises SettingError for an optimizer or scheduler that refuses its settings, or needs more than a gradient.

    Both are tried on a small parameter, before a model loads.

    Args:
        make: Makes the optimizer from parameter groups.
        make_scheduler: Makes the scheduler from an optimizer; None for no scheduler.
    """
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones_like(parameter)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        with made("model.optimizer"):
            optimizer = make([{"params": [parameter]}])
        try:
            if type(optimizer).__module__.startswith("torch.optim."):  # others may compile a kernel, for minutes
                optimizer.step()
        except TypeError as error:
            raise SettingError(
                f"model.optimizer is {type(optimizer).__name__}, which takes no step from a gradient alone "
                f"({reason(error)}); use another, such as torch.optim.AdamW"
            ) from error
        except RuntimeError as error:
            if isinstance(optimizer, torch.optim.SparseAdam):
                raise SettingError(
                    "model.optimizer is SparseAdam, but gradients here are dense; use torch.optim.AdamW"
                ) from error
        if make_scheduler is None:
            return
        with made("model.lr_scheduler"):
            scheduler = make_scheduler(optimizer)
        try:
            scheduler.step()
        except (ArithmeticError, LookupError) as error:
            raise SettingError(
                f"model.lr_scheduler is {type(scheduler).__name__}, which fails at its first step "
                f"({reason(error)}); correct its settings"
            ) from error
        except TypeError as error:
            raise SettingError(
                f"model.lr_scheduler is {type(scheduler).__name__}, which needs more than to be told of a step "
                f"({reason(error)}); use one that counts optimizer steps, such as torch.optim.lr_scheduler.LinearLR"
            ) from error


@contextmanager
def made(setting: str) -> Iterator[None]:
    """Converts a class's errors about its own settings to SettingError."""
    try:
        yield
    except SettingError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise SettingError(f"{setting} cannot be made: {reason(error)}; correct its settings") from error


def group_settings(optimizer: Optimizer) -> list[GroupSettings]:
    """Returns the settings of each parameter group."""
    return [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]


def obey(optimizer: Optimizer, settings: Sequence[GroupSettings], scheduled: bool) -> None:
    """Applies the present settings to an optimizer, because a checkpoint also restores its old settings.

    Args:
        optimizer: Optimizer, possibly with a checkpoint's state.
        settings: The present :func:`group_settings`.
        scheduled: Whether a scheduler sets the learning rate, which then does not change.
    """
    kept = {"lr", "initial_lr"} if scheduled else set()
    for group, present in zip(optimizer.param_groups, settings, strict=True):
        group.update({name: value for name, value in present.items() if name not in kept})
        if isinstance(optimizer, Adam):
            _place_step_counts(optimizer, group)


def check_state(make: Callable[[Any], Optimizer], checkpoint: Mapping[str, Any]) -> None:
    """Raises SettingError if a checkpoint's optimizer lacks state that this run's optimizer needs.

    Args:
        make: Makes this run's optimizer from parameter groups.
        checkpoint: Contents of the checkpoint.
    """
    saved = [each.get("state", {}) for each in checkpoint.get("optimizer_states", [])]
    states = [of_weight for each in saved for of_weight in each.values() if of_weight]
    if not states:
        return
    asked: set[str] = set()
    with suppress(Exception), torch.random.fork_rng(devices=[]):  # an optimizer that fails here is not checked
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.ones(1)
        optimizer = make([{"params": [weight]}])
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, for minutes
            optimizer.step()
        asked = set(optimizer.state[weight])
        name = type(optimizer).__name__
    if missing := sorted(asked - set(states[0])):
        raise SettingError(
            f"model.optimizer is {name}, which needs {', '.join(missing)} of each weight, but the checkpoint's "
            f"optimizer kept {', '.join(sorted(states[0]))}; resume with the optimizer of that run"
        )


def _place_step_counts(optimizer: Optimizer, group: GroupSettings) -> None:
    """Moves step counts: fused kernels need them on the parameters' device, others on the CPU."""
    on_device = group["fused"] or group["capturable"]
    for parameter in group["params"]:
        step = optimizer.state.get(parameter, {}).get("step")
        if isinstance(step, torch.Tensor):
            device = parameter.device if on_device else torch.device("cpu")
            optimizer.state[parameter]["step"] = step.to(device=device, dtype=torch.float32)


# -- optimizers without state ----------------------------------------------------------------------------------------

# To save or load a sharded optimizer that has taken no step, and so has no state, torch first makes one by a step with
# gradients of zero (`torch.distributed.checkpoint.state_dict`). That step would count: Adam's next update would be its
# second.


@contextmanager
def left_as_they_are(trainer: L.Trainer) -> Iterator[list[int]]:
    """Context for saving, after which optimizers without state have none again, the same settings and random numbers.

    Torch sets their learning rate to 0 meanwhile, so weights do not move.

    Args:
        trainer: Trainer of this rank.

    Yields:
        Indices of these optimizers, the checkpoint's UNSTEPPED.
    """
    without = {index: each for index, each in enumerate(trainer.optimizers) if not each.state}
    settings = {index: group_settings(each) for index, each in without.items()}
    device = trainer.strategy.root_device
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, enabled=bool(without)):
            yield list(without)
    finally:
        for index, optimizer in without.items():
            optimizer.state.clear()
            for group, own in zip(optimizer.param_groups, settings[index], strict=True):
                for name in group.keys() - own.keys() - {"params"}:
                    del group[name]
                group.update(own)


def clear_unstepped(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Gives the optimizers that had no state when a checkpoint was written none.

    Args:
        trainer: Trainer that resumes. FSDP2 has already loaded its optimizers, other strategies load them afterwards.
        checkpoint: The checkpoint; its optimizer states are changed.
    """
    states = checkpoint.get("optimizer_states", [])
    for index in checkpoint.get(UNSTEPPED, []):
        for optimizer in trainer.optimizers[index : index + 1]:
            optimizer.state.clear()
        for state in states[index : index + 1]:
            state["state"] = {}
