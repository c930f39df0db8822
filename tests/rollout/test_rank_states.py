"""States of the ranks in a checkpoint: who gets them, and what another number of ranks takes from them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from helpers.processes import on_two_ranks

from popo_lightning.core import ranks
from popo_lightning.rollout.rank_states import PlaceState
from popo_lightning.rollout.resumable import ResumableRollouts


def saved() -> list[Any]:
    """Returns the stores in a checkpoint's state on this rank."""
    rank = dist.get_rank()
    place = PlaceState({"iteration": 3}, {"composer": [f"group of rank {rank}"] * (1 + 99 * rank)})
    data: Any = SimpleNamespace(as_of=place, ahead=SimpleNamespace(state_dict=dict))
    state = ResumableRollouts.state_dict(data)
    assert state["iteration"] == 3
    return [of_rank["composer"][0] for of_rank in state["ranks"]]


def saved_twice(backend: str) -> tuple[list[Any], list[str]]:
    """Returns the stores, and the backends of the groups made for them, if the default group has this backend."""
    dist.init_process_group("gloo")
    made: list[str] = []
    new_group = dist.new_group
    dist.new_group = lambda **given: made.append(given["backend"]) or new_group(**given)
    dist.get_backend = lambda: backend
    try:
        return [saved(), saved()], made
    finally:
        ranks.HOST_GROUPS.clear()
        dist.destroy_process_group()


def test_only_rank_0_gets_the_stores_of_all_ranks(tmp_path: Path) -> None:
    """They are gathered in host memory, by a group that is made once."""
    everyones, own = ["group of rank 0", "group of rank 1"], ["group of rank 1"]
    for backend, made in (("gloo", []), ("nccl", ["gloo"])):
        assert on_two_ranks(saved_twice, tmp_path, backend, seconds=60) == [
            ([everyones] * 2, made),
            ([own] * 2, made),
        ]
