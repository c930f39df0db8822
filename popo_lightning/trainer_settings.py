"""Settings of Lightning's trainer, refused in one sentence before a trainer is made of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry

from popo_lightning.errors import SettingError, reason
from popo_lightning.plan.run_settings import check_precision, count_devices

SEEDS = 2**32  # numpy takes those below


def check_seed(seed: Any) -> None:
    """Raises SettingError for a seed that draws nothing, or another one each time.

    Args:
        seed: seed_everything.
    """
    if isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise SettingError(f"seed_everything is {seed}; use a whole number from 0 to {SEEDS - 1}")


def check_trainer(trainer: Any) -> None:
    """Raises SettingError for settings that Lightning would refuse later, or obey in part.

    Args:
        trainer: Settings as they were parsed.
    """
    check_precision(trainer.precision)
    _check_strategy(trainer.strategy)
    _check_devices(trainer)
    if trainer.num_nodes < 1:
        raise SettingError(f"trainer.num_nodes is {trainer.num_nodes}; use at least 1")


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
    devices = count_devices(trainer.devices, on_gpu, [])
    alone = trainer.strategy == "single_device" and devices * trainer.num_nodes > 1
    if alone:
        raise SettingError(
            f"trainer.strategy is single_device, which leaves all but one of {devices * trainer.num_nodes} devices "
            "alone; set trainer.devices and trainer.num_nodes to 1, or trainer.strategy to ddp"
        )


def check_cpu_devices(devices: Any) -> None:
    """Raises SettingError for what asks for GPUs.

    Args:
        devices: trainer.devices of a run on CPUs.
    """
    if devices != "auto" and not str(devices).strip().isdecimal():
        raise SettingError(
            f"trainer.devices is {devices}, but this run is on a CPU, where it is the number of processes; set it to 1"
        )


def chosen_accelerator(setting: Any) -> Any:
    """The device of trainer and engine: auto is CUDA where torch sees a GPU, and else the CPU.

    Lightning's own auto would be MPS on a Mac, which lacks the float64 that numbers over ranks are summed in.

    Args:
        setting: trainer.accelerator.

    Raises:
        SettingError: A device that is not here, or that nothing here is made for.
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
    """Raises SettingError where other nodes are waited for that nobody has told of this one.

    Args:
        trainer: As it is made, before its processes are joined.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise SettingError(
            f"trainer.num_nodes is {trainer.num_nodes}, but neither torchrun nor SLURM has started this process, which "
            "would wait for the other nodes in vain; start it as docs/multi_node.md says, or set trainer.num_nodes to 1"
        )


@contextmanager
def lightnings_refusals() -> Iterator[None]:
    """What Lightning's trainer refuses, as one sentence."""
    try:
        yield
    except SettingError:
        raise
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        raise SettingError(f"trainer's settings do not go together: {reason(error)}") from error
