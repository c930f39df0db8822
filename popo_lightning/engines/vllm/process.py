"""Prepares the process that vLLM shares with the trainer, and restores what vLLM's start changes in it."""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.utilities.seed import isolate_rng

from popo_lightning.core.errors import SettingError
from popo_lightning.engines.base import EngineContext


def not_installed(error: ImportError) -> SettingError:
    """The error for a vLLM that does not import; vLLM only has wheels for Linux."""
    instead = "set data.engine to popo_lightning.engines.transformers.TransformersEngine"
    if sys.platform != "linux":
        return SettingError(f"data.engine is VLLMEngine, but vLLM has no wheel for {platform.system()}; {instead}")
    return SettingError(
        f"data.engine is VLLMEngine but vLLM does not import ({error}); install the extra 'cpu' or 'gpu', or {instead}"
    )


def check_platform(device: torch.device) -> None:
    """Raises SettingError if vLLM does not import, or samples on another kind of device than the trainer.

    Args:
        device: Device of the trainer.
    """
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise not_installed(error) from error
    found = current_platform.device_type or "no device of this machine"
    if found == device.type:
        return
    remedy = {
        "cuda": "set trainer.accelerator to auto, or install vLLM's CPU build (the extra 'cpu')",
        "cpu": "set trainer.accelerator to cpu, or install vLLM's CUDA build (the extra 'gpu')",
    }.get(found, f"install the build of vLLM for {device.type}")
    raise SettingError(
        f"trainer.accelerator trains on {device.type}, but the installed vLLM samples on {found}; {remedy}, or set "
        "data.engine to popo_lightning.engines.transformers.TransformersEngine"
    )


def external_launcher(context: EngineContext) -> bool:
    """Whether vLLM takes its ranks and its GPU from the environment; otherwise it would take the first GPU."""
    return context.world_size > 1 or context.device.type == "cuda"


def set_environment() -> None:
    """Sets what vLLM reads from the environment in a process that trains, too."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, which has the weights
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # otherwise vLLM pins the trainer's threads
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextmanager
def ranks_in_environment(context: EngineContext) -> Iterator[None]:
    """Puts the trainer's ranks into the environment, under the names that vLLM reads.

    Only torchrun sets all of them. Lightning reads the same names, so the old values are restored afterwards.

    Args:
        context: Context with the ranks. On a GPU, vLLM reads LOCAL_RANK as the number of the GPU.
    """
    on_gpu = context.device.type == "cuda" and context.device.index is not None
    names: dict[str, object] = {
        "RANK": context.rank,
        "WORLD_SIZE": context.world_size,
        "LOCAL_RANK": context.device.index if on_gpu else context.local_rank,
    }
    if not dist.is_initialized():  # vLLM then makes a process group of this rank alone, at a port of its own
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_network_port()}
        names |= {"TORCHELASTIC_USE_AGENT_STORE": False}  # torchrun's store is not at that port
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def state_put_back(device: torch.device) -> Iterator[None]:
    """Undoes what vLLM's start changes in the process.

    It seeds the random states of Python, numpy and torch, sets the number of threads (and, on a CPU, replaces the
    function that does), the float32 matmul precision and the current GPU, and freezes all existing objects, which the
    garbage collector would then never free.

    Args:
        device: Device of the trainer.
    """
    on_gpu = device.type == "cuda"
    current = torch.cuda.current_device() if on_gpu else None
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    precision, frozen = torch.get_float32_matmul_precision(), gc.get_freeze_count()
    try:
        with isolate_rng(include_cuda=on_gpu):
            yield
    finally:
        setattr(torch, "set_num_threads", set_threads)  # noqa: B010  # a name of a module's, to mypy
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        if not frozen:
            gc.unfreeze()
        if current is not None:
            torch.cuda.set_device(current)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Lets torch compute on another number of CPU threads.

    Args:
        count: Number of threads; None changes nothing.
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
