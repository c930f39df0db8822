"""One rank reports a refusal: rank 0 if all ranks refuse, otherwise a rank that does."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SAID = "popo_refusal"  # key of what rank 0 has said
SECONDS = 10.0  # that rank 0 may take to come to the same point


def speak(sentence: str) -> None:
    """Prints a sentence on rank 0; on another rank only if rank 0 has said nothing when it had time to.

    Ranks are those of the process group, or before there is one those that torchrun has started. Where nothing joins
    the ranks yet, as under SLURM before the first collective, each speaks for itself.

    Args:
        sentence: Without the name of the command.
    """
    store, rank = _store(os.environ)
    if store is not None and rank and _has_spoken(store):
        return
    print(f"popo: {sentence}", file=sys.stderr, flush=True)
    if store is not None and not rank:
        _tell(store, sentence)


def _store(environment: Mapping[str, str]) -> tuple[Any, int]:
    """What the ranks share, None for nothing, and which of them this is."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store(), dist.get_rank()
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environment.get("WORLD_SIZE", "1") == "1":
        return None, 0
    try:
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SECONDS))
        restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"popo_{restart}", store), int(environment["RANK"])
    except (KeyError, ValueError, RuntimeError):
        return None, 0


def _has_spoken(store: Any) -> bool:
    try:
        store.wait([SAID], timedelta(seconds=SECONDS))
    except dist.DistStoreError:  # rank 0 had time enough
        return False
    except RuntimeError:  # it has ended, and with it what the ranks share
        return True
    return True


def _tell(store: Any, sentence: str) -> None:
    try:
        store.set(SAID, sentence)
    except RuntimeError:  # nobody is left who would hear
        return
