"""One rank reports a refusal: rank 0 if all ranks refuse, otherwise a rank that does."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SAID = "popo_refusal"  # key of the sentence that rank 0 has printed
SECONDS = 10.0  # time that rank 0 may take to reach the same point


def print_refusal(sentence: str) -> None:
    """Prints a sentence on rank 0; on another rank only if rank 0 printed none in time.

    Ranks are those of the process group, or those that torchrun started if there is no group yet. If nothing connects
    the ranks yet, as under SLURM before the first collective, each rank prints the sentence.

    Args:
        sentence: Sentence without the name of the command.
    """
    store, rank = _store(os.environ)
    if store is not None and rank and _has_spoken(store):
        return
    print(f"popo: {sentence}", file=sys.stderr, flush=True)
    if store is not None and not rank:
        with suppress(RuntimeError):  # no rank is left to read it
            store.set(SAID, sentence)


def _store(environment: Mapping[str, str]) -> tuple[Any, int]:
    """The store that the ranks share, or None, and this process's rank."""
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
    except dist.DistStoreError:  # rank 0 printed nothing in time
        return False
    except RuntimeError:  # rank 0 has ended, and the store with it
        return True
    return True
