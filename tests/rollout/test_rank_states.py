"""States of the ranks in a checkpoint: who gets them, and what another number of ranks takes from them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from helpers.groups import group
from helpers.processes import on_two_ranks

from popo_lightning.core import ranks
from popo_lightning.core.errors import SettingError
from popo_lightning.methods.dapo import DynamicSampling
from popo_lightning.methods.mopps import MoPPS
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Composer
from popo_lightning.rollout.rank_states import PlaceState, reshard, rules_of, without_other_rules
from popo_lightning.rollout.resumable import ResumableRollouts
from popo_lightning.tasks.samplers import EpochSampler, PromptSampler


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


def started(sampler: PromptSampler, rank: int = 0, ranks: int = 8) -> PromptSampler:
    sampler.start(40, 1, rank, ranks)
    return sampler


def of_popo(ranks: int) -> list[dict[str, Any]]:
    """Returns the states of a POPO run's ranks between two iterations."""
    buffer = GroupReplayBuffer()
    buffer.insert([group(1)], 1)
    popo, epochs = PrioritizedGroupReplay(buffer), started(EpochSampler())
    epochs.draw(3)
    own = {"sampler": epochs.state_dict(), "composer": popo.state_dict(), "pending": [], "rollout_metrics": {}}
    return [own | {"groups_made": 3} for _ in range(ranks)]


def taken(sampler: PromptSampler, composer: Composer, ranks: int) -> list[dict[str, Any]]:
    """Returns what the ranks of a run with these rules take from a checkpoint of POPO on eight ranks."""
    there = rules_of(EpochSampler(), PrioritizedGroupReplay(GroupReplayBuffer()), "abc")
    states = without_other_rules(of_popo(8), there, rules_of(sampler, composer, "abc"))
    return reshard(states, ranks, sampler, composer)


@pytest.mark.parametrize("ranks", [1, 4, 8, 16])
def test_another_rule_begins_anew_on_any_number_of_ranks(ranks: int) -> None:
    """Its fresh state has nothing to redistribute, which DynamicSampling and MoPPS would refuse."""
    composer, sampler = DynamicSampling(), started(MoPPS(), ranks=ranks)
    found = taken(sampler, composer, ranks)
    assert len(found) == ranks and found[0].keys() >= {"pending", "groups_made"}
    assert not any({"composer", "sampler"} & each.keys() for each in found)


def test_the_rule_that_stays_is_redistributed() -> None:
    epochs = started(EpochSampler(), ranks=4)
    found = taken(epochs, DynamicSampling(), 4)
    assert [each["sampler"] for each in found] == [{"cursor": 24}] * 4
    popo = PrioritizedGroupReplay(GroupReplayBuffer())
    found = taken(started(MoPPS(), ranks=4), popo, 4)
    assert [len(each["composer"]["buffer"]["groups"]) for each in found] == [2] * 4


def test_the_same_rule_still_refuses() -> None:
    sampling = DynamicSampling()
    states = [each | {"composer": sampling.state_dict()} for each in of_popo(8)]
    same = rules_of(EpochSampler(), sampling, "abc")
    states = without_other_rules(states, same, same)
    with pytest.raises(SettingError, match=r"what data\.composer DynamicSampling keeps"):
        reshard(states, 4, EpochSampler(), sampling)
