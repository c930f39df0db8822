"""Refuses unusable settings of Lightning's trainer, each in one sentence, before a trainer is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry

from popo_lightning.cli.plan.run_settings import count_devices
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.model.sharding import check_precision

INSTEAD = "evaluation.every_n_iterations and evaluation.limit"
# Settings that an iteration could not obey, or only in part: the values allowed, and what to set instead.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_steps": ((-1,), "would end the run inside an iteration; set trainer.max_epochs, which counts iterations"),
    "min_steps": ((None,), "counts optimizer steps; set trainer.min_epochs, which counts iterations"),
    "limit_train_batches": (
        (None, 1.0),
        "would leave out minibatches of every iteration; set data.minibatches or data.problems_per_iteration",
    ),
    "overfit_batches": ((0.0, 0), "would leave out minibatches of every iteration; give data.task fewer problems"),
    "fast_dev_run": (
        (False, 0),
        "would train on a part of an iteration; for a short trial set trainer.max_epochs to 1 and evaluation.limit",
    ),
    "limit_val_batches": ((None, 1.0), f"would do nothing or leave out benchmarks; set {INSTEAD}"),
    "limit_test_batches": ((None, 1.0), "would leave out benchmarks; set evaluation.limit"),
    "limit_predict_batches": ((None, 1.0), "would leave out benchmarks; set evaluation.limit"),
    "val_check_interval": ((None, 1.0), f"would do nothing; set {INSTEAD}"),
    "check_val_every_n_epoch": ((1,), f"would do nothing; set {INSTEAD}"),
    "num_sanity_val_steps": ((None, 0), "would do nothing; evaluation.at_start evaluates before training"),
    "reload_dataloaders_every_n_epochs": ((0,), "would do nothing: every iteration samples; leave it out"),
    "use_distributed_sampler": ((False,), "would give ranks different benchmarks to wait in; leave it out"),
    "sync_batchnorm": ((False,), "would do nothing: no policy here has batch norms; leave it out"),
    "gradient_clip_val": ((None,), "would do nothing, since optimization is manual; set model.max_grad_norm"),
    "gradient_clip_algorithm": ((None,), "would do nothing, since optimization is manual; set model.max_grad_norm"),
    "accumulate_grad_batches": (
        (1,),
        "would do nothing: a minibatch is one optimizer step already; set data.minibatches, and "
        "model.micro_batch_tokens for memory",
    ),
    "enable_checkpointing": ((None, True), "is not how a run goes without; set checkpoint.save_top_k to 0"),
    "barebones": ((False,), "leaves out loggers, callbacks and checkpoints, which a run is made of; leave it out"),
}
# Callbacks that break a run, by class name, and why.
REFUSED = {
    "GradientAccumulationScheduler": "a minibatch is one optimizer step; set data.minibatches",
    "StochasticWeightAveraging": "its last epoch trains nothing and would be an iteration; set parameter_hook instead",
    "BatchSizeFinder": "there is no batch size to find; set model.micro_batch_tokens",
    "LearningRateFinder": "its trial steps would be iterations; set model.optimizer's lr",
}

PROCESSES = 16  # processes that are allowed even on a machine with fewer cores
SEEDS = 2**32  # numpy takes seeds below this


def check_seed(seed: Any) -> None:
    """Raises SettingError for a seed that is not a fixed number in numpy's range.

    Args:
        seed: Setting seed_everything.
    """
    if isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise SettingError(f"seed_everything is {seed}; use a whole number from 0 to {SEEDS - 1}")


def check_trainer(trainer: Any) -> None:
    """Raises SettingError for settings that Lightning would refuse later or obey only in part.

    Args:
        trainer: Settings as parsed.
    """
    for name, (fine, consequence) in FIXED.items():
        value = getattr(trainer, name, fine[0])
        if not any(value == one and type(value) is type(one) for one in fine):
            raise SettingError(f"trainer.{name} is {value}, which {consequence}")
    _check_iterations(trainer)
    check_precision(trainer.precision)
    _check_strategy(trainer.strategy)
    _check_devices(trainer)
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 0:
        raise SettingError(f"trainer.log_every_n_steps is {trainer.log_every_n_steps}; use at least 1")
    if trainer.num_nodes < 1:
        raise SettingError(f"trainer.num_nodes is {trainer.num_nodes}; use at least 1")


def _check_iterations(trainer: Any) -> None:
    most, least = trainer.max_epochs, getattr(trainer, "min_epochs", None)
    if most is None or (most < 1 and most != -1):
        raise SettingError(f"trainer.max_epochs is {most}; it counts iterations: use at least 1, or -1 for no end")
    if least is not None and most != -1 and least > most:
        raise SettingError(f"trainer.min_epochs is {least}, more than trainer.max_epochs, {most}; lower the first")


def check_root(root: str | None, folder: str | None) -> None:
    """Raises SettingError for a folder that the run would not write to.

    Args:
        root: Setting trainer.default_root_dir.
        folder: Setting run.folder, which the config.yaml of an earlier version repeats in default_root_dir.
    """
    if root is not None and root != folder:
        raise SettingError(
            f"trainer.default_root_dir is '{root}', which would do nothing; set run.folder, or run.root for the folder "
            "of all runs"
        )


def check_callbacks(callbacks: Iterable[L.Callback], checkpoint_io: CheckpointIO | None) -> None:
    """Raises SettingError for callbacks and plugins that break iterations or checkpoints.

    Args:
        callbacks: Callbacks of the trainer.
        checkpoint_io: Writes the checkpoints of the trainer's strategy; None for Lightning's own.
    """
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in REFUSED and kind.__module__.startswith("lightning."):
                raise SettingError(f"trainer.callbacks has {kind.__name__}, but {REFUSED[kind.__name__]}")
        if isinstance(callback, Timer) and callback._interval != "epoch":
            raise SettingError(
                "trainer.callbacks has a Timer with interval step, which would end the run in the middle of an "
                "iteration; set its interval to epoch"
            )
    if isinstance(checkpoint_io, AsyncCheckpointIO):
        raise SettingError(
            "trainer.plugins has AsyncCheckpointIO, which would write a checkpoint while the run changes what belongs "
            "in it; leave it out"
        )


def _check_strategy(strategy: Any) -> None:
    if not isinstance(strategy, str) or strategy == "auto" or strategy.lower() in StrategyRegistry:
        return
    if strategy.isidentifier() and not strategy.endswith("Strategy"):
        raise SettingError(
            f"trainer.strategy is '{strategy}', which Lightning has none of; use auto, ddp, or a class by "
            "trainer.strategy.class_path, as configs/scale does"
        )
    if all(part.isidentifier() for part in strategy.split(".")):
        raise SettingError(
            f"trainer.strategy is '{strategy}', but a class is named by its class_path: --trainer.strategy.class_path "
            f"{strategy}, or the same in a file"
        )
    raise SettingError(
        f"trainer.strategy is '{strategy}', neither a name such as ddp nor a strategy's class with settings that it "
        "has; configs/scale has examples"
    )


def _check_devices(trainer: Any) -> None:
    on_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
    devices = count_devices(trainer.devices, on_gpu, []) * trainer.num_nodes
    if trainer.strategy == "single_device" and devices > 1:
        raise SettingError(
            f"trainer.strategy is single_device, which leaves all but one of {devices} devices alone; set "
            "trainer.devices and trainer.num_nodes to 1, or trainer.strategy to ddp"
        )


def check_cpu_devices(devices: Any) -> None:
    """Raises SettingError if trainer.devices asks for GPUs or too many processes on a CPU.

    Args:
        devices: Setting trainer.devices.
    """
    if devices != "auto" and not str(devices).strip().isdecimal():
        raise SettingError(
            f"trainer.devices is {devices}, but this run is on a CPU, where it is the number of processes; set it to 1"
        )
    most = max(PROCESSES, os.cpu_count() or 1)
    if devices != "auto" and int(devices) > most:
        raise SettingError(f"trainer.devices is {devices}, processes on a CPU; use at most {most}")


def chosen_accelerator(setting: Any) -> Any:
    """Chooses the accelerator of trainer and engine: auto is CUDA if torch sees a GPU, else the CPU.

    Lightning's auto would be MPS on a Mac, which lacks the float64 that sums over ranks need.

    Args:
        setting: Setting trainer.accelerator.

    Raises:
        SettingError: The device is missing or unsupported.
    """
    found = torch.cuda.is_available()
    if setting == "auto":
        return "cuda" if found else "cpu"
    if setting in ("gpu", "cuda"):
        if not found:
            raise SettingError(
                f"trainer.accelerator is {setting}, but torch {torch.__version__} sees no CUDA device here; set it to "
                "auto or cpu, or install torch's CUDA build and NVIDIA's driver"
            )
        return "cuda"
    if setting == "mps":
        raise SettingError("trainer.accelerator is mps, which has no float64 to sum in; set it to cpu")
    if isinstance(setting, str) and setting != "cpu":
        raise SettingError(f"trainer.accelerator is '{setting}'; use auto, gpu or cpu")
    return setting


def check_nodes(trainer: L.Trainer) -> None:
    """Raises SettingError if the run would wait for other nodes that no launcher has started.

    Args:
        trainer: New trainer, before its processes are joined.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise SettingError(
            f"trainer.num_nodes is {trainer.num_nodes}, but neither torchrun nor SLURM has started this process, which "
            "would wait for the other nodes in vain; start it as docs/multi_node.md says, or set trainer.num_nodes to 1"
        )


@contextmanager
def lightnings_refusals() -> Iterator[None]:
    """Turns what Lightning's trainer refuses into one sentence."""
    try:
        yield
    except SettingError:
        raise
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        raise SettingError(f"trainer's settings do not go together: {reason(error)}") from error
