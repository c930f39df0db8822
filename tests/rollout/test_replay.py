"""The buffer, the composers that decide what is trained on, and the sampler that decides what is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration, response

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.problems import Problem
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.methods.popo_ablations import KLRanked
from popo_lightning.methods.popo_gated import GatedReplay
from popo_lightning.replay.buffer import GroupReplayBuffer, one_of_each_problem
from popo_lightning.replay.composer import Filter, OnPolicy, composed_groups
from popo_lightning.tasks.samplers import EpochSampler

DULL = (1.0, 1.0)  # scores of an ineffective group


def buffer_of(*groups: Group, capacity: int = 10, max_age: int | None = None) -> GroupReplayBuffer:
    buffer = GroupReplayBuffer(capacity, max_age)
    buffer.insert(groups, 5)
    return buffer


def saved_and_read(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


# -- groups --------------------------------------------------------------------------------------------------------


def test_equal_rewards_are_ineffective_however_they_round() -> None:
    for value in (0.1, 1 / 3, 0.7, 1e6, 0.0, -0.1):
        for count in (2, 7, 8, 16):
            assert not group(0, scores=[value] * count).is_effective()
    assert float(torch.tensor([0.1] * 7).std()) > 0  # a test of the std would call this effective
    assert not group(0, scores=(0.5, 0.5 + 1e-7)).is_effective()
    assert group(0, scores=(0.5, 0.5 + 1e-5)).is_effective()
    assert group(0, scores=(-1.0, 0.0, 0.0)).is_effective()


def test_effective_by_the_part_that_is_trained_on() -> None:
    shaped = group(0, scores=(0.0, 0.1), accs=(0.0, 0.0))
    assert shaped.is_effective() and shaped.is_effective("score") and not shaped.is_effective("acc")
    assert shaped.rewards("acc").tolist() == [0, 0]
    assert iteration(0, effective_key="acc").split([shaped]) == ([], [shaped])
    assert iteration(0).split([shaped]) == ([shaped], [])


def test_group_survives_a_checkpoint(tmp_path: Path) -> None:
    answers = [response((3, 1, 2), (-0.1, -0.2, -1e-9), 1.0, failure="timeout"), response((5,), (-3.0,), 0.5, 0.0)]
    problem = Problem("p", [{"role": "user", "content": "é"}], {"numbers": [1]}, {"level": 3})
    made = Group(7, problem, torch.tensor([9, 8]), answers, 4)
    read = saved_and_read(made, tmp_path)
    assert (read.id, read.version, read.problem, read.tokens) == (7, 4, problem, 4)
    assert read.prompt_ids.tolist() == [9, 8]
    for old, new in zip(answers, read.responses, strict=True):
        assert torch.equal(old.token_ids, new.token_ids) and torch.equal(old.behave_logp, new.behave_logp)
        assert (old.finish_reason, old.text, old.parts, old.failure) == (
            new.finish_reason,
            new.text,
            new.parts,
            new.failure,
        )


# -- buffer --------------------------------------------------------------------------------------------------------


def test_newest_first_whatever_was_stored() -> None:
    """Compares with the rule written out: versions in any order, the oldest insertions leave, ages are bounded."""
    random = Random(0)
    for _ in range(200):
        capacity, max_age = random.randint(1, 12), random.choice([None, 1, 3])
        buffer, stored = GroupReplayBuffer(capacity, max_age), []
        for made in range(random.randint(1, 8)):
            came = [group(10 * made + i, random.randint(0, 6), f"p{random.randint(0, 4)}") for i in range(3)]
            buffer.insert(came, 5)
            stored = [*stored, *came][-capacity:]
            version, min_age = random.randint(0, 9), random.randint(1, 3)
            allowed = [g for g in stored if min_age <= version - g.version <= (99 if max_age is None else max_age)]
            ranked = sorted(allowed, key=lambda g: -g.version)
            assert ids(buffer.usable(version, min_age)) == ids(ranked)
            assert ids(buffer.newest(2, version, min_age, {"p0"})) == ids(one_of_each_problem(ranked, 2, {"p0"}))
        buffer.load_state_dict(buffer.state_dict())
        assert len(buffer) == len(stored) and ids(buffer.usable(99 if max_age is None else 5)) == ids(
            sorted((g for g in stored if max_age is None or 1 <= 5 - g.version <= max_age), key=lambda g: -g.version)
        )


def test_oldest_fall_out() -> None:
    buffer = buffer_of(*(group(i, version=i) for i in range(5)), capacity=3)
    assert len(buffer) == 3
    assert ids(buffer.newest(9, version=9)) == [4, 3, 2]
    buffer.insert([group(5, version=0)], 1)  # first in, first out by insertion, not by version
    assert ids(buffer.newest(9, version=9)) == [4, 3, 5]


def test_newest_version_first_and_in_order_of_insertion_within() -> None:
    buffer = buffer_of(group(0, 1), group(1, 1), group(2, 3), group(3, 3), group(4, 3), group(5, 2))
    assert ids(buffer.newest(6, version=4)) == [2, 3, 4, 5, 0, 1]
    assert ids(buffer.newest(2, version=4)) == [2, 3]
    assert buffer.newest(0, version=4) == []


def test_age_limits_on_both_sides() -> None:
    groups = [group(i, version=i) for i in range(6)]
    assert ids(buffer_of(*groups, max_age=2).newest(9, version=6)) == [5, 4]  # ages 1 and 2
    assert ids(buffer_of(*groups, max_age=2).newest(9, version=5)) == [4, 3]  # version 5 itself has age 0
    assert ids(buffer_of(*groups).newest(9, version=5, min_age=3)) == [2, 1, 0]
    assert ids(buffer_of(*groups).newest(9, version=5, min_age=0)) == [5, 4, 3, 2, 1, 0]
    assert len(buffer_of(*groups, max_age=None).newest(9, version=1000)) == 6
    assert buffer_of(*groups, max_age=1).newest(9, version=1000) == []


def test_replay_does_not_consume() -> None:
    buffer = buffer_of(group(0, 0), group(1, 0))
    for version in (1, 2, 3):
        assert ids(buffer.newest(2, version)) == [0, 1]
    assert len(buffer) == 2


def test_a_group_is_replayed_no_more_often_than_it_may_be(tmp_path: Path) -> None:
    def as_they_were(groups: Sequence[Group]) -> list[list[torch.Tensor]]:
        return [[response.behave_logp for response in group.responses] for group in groups]

    def replayed(composer: PrioritizedGroupReplay, versions: range) -> list[list[int]]:
        found = []
        for version in versions:
            dull = [group(10 * version + i, version, scores=DULL) for i in (0, 1)]
            found.append(ids(composer.compose(iteration(version, dull, present_logprobs=as_they_were))))
        return found

    def stored(max_uses: int | None, composer: type[PrioritizedGroupReplay] = PrioritizedGroupReplay) -> Any:
        made = composer(GroupReplayBuffer(10, None, max_uses))
        made.buffer.insert([group(0, 0, "a"), group(1, 0, "b"), group(2, 0, "c")], 5)
        return made

    assert replayed(stored(None), range(1, 5)) == [[0, 1]] * 4  # as in the paper
    assert replayed(stored(1), range(1, 5)) == [[0, 1], [2], [], []]
    assert replayed(stored(2), range(1, 6)) == [[0, 1], [0, 1], [2], [2], []]
    for kind in (GatedReplay, KLRanked):  # these choose among all usable groups
        made = stored(1, kind)
        assert sorted(id for found in replayed(made, range(1, 5)) for id in found) == [0, 1, 2]
    first, rest, fewer_ranks = stored(2), stored(2), stored(2)
    assert replayed(first, range(1, 3)) == [[0, 1]] * 2
    state = saved_and_read(first.state_dict(), tmp_path)
    rest.load_state_dict(state)
    fewer_ranks.load_state_dict(fewer_ranks.reshard([state, {"buffer": {"groups": []}}], 1)[0])
    assert replayed(rest, range(3, 6)) == replayed(fewer_ranks, range(3, 6)) == [[2], [2], []]
    assert not first.buffer._uses.keys() - {0, 1}
    first.buffer.insert([group(100 + i, 3) for i in range(10)], 5)
    assert not first.buffer._uses  # nothing is kept about groups that have left


def test_no_problem_twice_while_avoidable() -> None:
    buffer = buffer_of(group(0, 1, "a"), group(1, 2, "b"), group(2, 3, "a"), group(3, 3, "c"), group(4, 3, "c"))
    assert ids(buffer.newest(2, version=4)) == [2, 3]
    assert ids(buffer.newest(3, version=4)) == [2, 3, 1]  # b rather than c again
    assert ids(buffer.newest(4, version=4)) == [2, 3, 1, 4]  # unavoidable: the newest repetition
    assert ids(buffer.newest(9, version=4)) == [2, 3, 1, 4, 0]
    assert ids(buffer.newest(2, version=4, exclude_problems={"a"})) == [3, 1]
    assert ids(buffer.newest(3, version=4, exclude_problems={"a", "b", "c"})) == [2, 3, 4]


def test_buffer_state_through_a_checkpoint(tmp_path: Path) -> None:
    buffer = buffer_of(*(group(i, version=i // 2, problem=f"p{i % 3}") for i in range(7)), capacity=5)
    state = saved_and_read(buffer.state_dict(), tmp_path)
    same, smaller = GroupReplayBuffer(5, None), GroupReplayBuffer(2, None)
    same.load_state_dict(state)
    smaller.load_state_dict(state)
    for read in (same, buffer):
        read.insert([group(7, version=4)], 1)
        assert len(read) == 5
    assert ids(same.newest(9, 9)) == ids(buffer.newest(9, 9)) == [7, 6, 4, 5, 3]  # 3 repeats the problem of 6
    assert ids(smaller.newest(9, 9)) == [6, 5]


def test_bad_buffer_settings_are_named() -> None:
    for settings, named in (
        ((0, None), "data.composer.buffer.capacity is 0"),
        ((1, 0), "data.composer.buffer.max_age is 0"),
        ((1, 1, 0), "data.composer.buffer.max_uses is 0"),
    ):
        with pytest.raises(SettingError, match=named):
            GroupReplayBuffer(*settings)


# -- composers -----------------------------------------------------------------------------------------------------


def test_on_policy_and_filter() -> None:
    fresh = [group(0, 5), group(1, 5, scores=DULL), group(2, 5), group(3, 5, scores=(0.0, 0.0))]
    assert OnPolicy().compose(iteration(5, fresh)) == fresh
    assert Filter().compose(iteration(5, fresh)) == [fresh[0], fresh[2]]
    assert Filter().compose(iteration(5, fresh[1:2])) == []
    shaped = [group(4, 5, scores=(0.0, 0.1), accs=(0.0, 0.0))]
    assert Filter().compose(iteration(5, shaped, "acc")) == []


@pytest.mark.parametrize(("composed", "named"), [(None, "NoneType"), ([1], "a list with int"), (3, "int")])
def test_a_composer_that_returns_no_groups_is_named(composed: Any, named: str) -> None:
    class Own(OnPolicy):
        def compose(self, iteration: Any) -> Any:
            return composed

    with pytest.raises(SettingError, match=f"data.composer is Own, whose compose returned {named}; return a list"):
        composed_groups(Own(), iteration(5, [group(0, 5)]))


def test_replay_fills_exactly_the_ineffective_places() -> None:
    composer = PrioritizedGroupReplay(buffer_of(group(0, 3), group(1, 4), group(2, 4), group(3, 2)))
    fresh = [group(10, 5, scores=DULL), group(11, 5), group(12, 5, scores=DULL), group(13, 5)]
    assert ids(composer.compose(iteration(5, fresh))) == [11, 13, 1, 2]
    assert ids(composer.buffer.newest(9, 6)) == [11, 13, 1, 2, 0, 3]  # only effective groups are stored


def test_empty_buffer_is_a_normal_state() -> None:
    composer = PrioritizedGroupReplay(GroupReplayBuffer(4))
    assert composer.compose(iteration(0, [group(0, 0, scores=DULL)])) == []
    assert len(composer.buffer) == 0
    assert ids(composer.compose(iteration(1, [group(1, 1, scores=DULL), group(2, 1)]))) == [2]
    # There is one stored group for three places.
    assert ids(composer.compose(iteration(2, [group(i, 2, scores=DULL) for i in (3, 4, 5)]))) == [2]


def test_own_groups_never_fill_own_holes() -> None:
    composer = PrioritizedGroupReplay(GroupReplayBuffer(10))
    fresh = [group(0, 5), group(1, 5, scores=DULL)]
    assert ids(composer.compose(iteration(5, fresh))) == [0]
    # Nor do they push out the groups that fill the places before these are chosen.
    composer = PrioritizedGroupReplay(buffer_of(group(0, 4), capacity=1))
    assert ids(composer.compose(iteration(5, [group(1, 5), group(2, 5, scores=DULL)]))) == [1, 0]
    assert ids(composer.buffer.newest(9, 6)) == [1]


def test_problems_of_the_batch_come_last() -> None:
    composer = PrioritizedGroupReplay(buffer_of(group(0, 4, "a"), group(1, 3, "b"), group(2, 4, "c")))
    fresh = [group(10, 5, "a"), group(11, 5, "c", scores=DULL)]
    assert ids(composer.compose(iteration(5, fresh))) == [10, 2]  # not a; c is only in a place that is given up


def test_all_effective_batch_is_left_as_it_is() -> None:
    composer = PrioritizedGroupReplay(buffer_of(group(0, 4), group(1, 4)))
    fresh = [group(i, 5) for i in (13, 11, 12)]
    assert composer.compose(iteration(5, fresh)) == fresh
    assert ids(composer.buffer.newest(9, 6)) == [13, 11, 12, 0, 1]


def test_composer_state_through_a_checkpoint(tmp_path: Path) -> None:
    def run(composer: PrioritizedGroupReplay, versions: range) -> list[list[int]]:
        return [ids(composer.compose(iteration(version, batch(version)))) for version in versions]

    def batch(version: int) -> list[Group]:
        return [
            group(10 * version + i, version, f"p{(version * 4 + i) % 7}", DULL if (version + i) % 3 else (0.0, 1.0))
            for i in range(4)
        ]

    whole, first, rest = (PrioritizedGroupReplay(GroupReplayBuffer(5, max_age=3)) for _ in range(3))
    expected = run(whole, range(8))
    run(first, range(4))
    rest.load_state_dict(saved_and_read(first.state_dict(), tmp_path))
    assert run(rest, range(4, 8)) == expected[4:]
    assert all(len(trained) == 4 for trained in expected[2:])


# -- sampler -------------------------------------------------------------------------------------------------------


def started(problems: int, seed: int = 1, rank: int = 0, world_size: int = 1) -> EpochSampler:
    sampler = EpochSampler()
    sampler.start(problems, seed, rank, world_size)
    return sampler


def test_every_problem_once_a_pass_in_a_new_order() -> None:
    sampler = started(10)
    drawn = [place for _ in range(10) for place in sampler.draw(3)]
    passes = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2] != list(range(10))
    assert started(10).draw(30) == drawn
    assert started(10, seed=2).draw(30) != drawn


def test_ranks_share_what_one_rank_would_draw() -> None:
    alone = started(11).draw(44)
    samplers = [started(11, rank=rank, world_size=4) for rank in range(4)]
    rounds = [[sampler.draw(2) for sampler in samplers] for _ in range(5)]  # 8 of 11 each, so beyond the end of a pass
    together = [drawn[i] for one in rounds for i in range(2) for drawn in one]
    assert together == alone[:40]
    assert all(count == 1 for count in Counter(together[:11]).values())


def test_resumed_sampler_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    for rank in range(2):
        whole, first, rest = (started(7, rank=rank, world_size=2) for _ in range(3))
        expected = [whole.draw(3) for _ in range(9)]
        assert [first.draw(3) for _ in range(4)] == expected[:4]
        rest.load_state_dict(saved_and_read(first.state_dict(), tmp_path))
        assert [rest.draw(3) for _ in range(5)] == expected[4:]


def test_sampler_can_be_started_on_other_problems() -> None:
    sampler = started(10)
    sampler.draw(1)
    sampler.start(4, 1, 0, 1)  # as a second data module does with the one default instance
    assert max(sampler.draw(3)) < 4


def test_without_a_capacity_the_buffer_keeps_as_many_groups_as_an_iteration_samples(tmp_path: Path) -> None:
    composer = PrioritizedGroupReplay(GroupReplayBuffer())
    for version in range(4):
        fresh = [group(10 * version + i, version, scores=(0.0, float(i < 2))) for i in range(3)]  # two are effective
        composer.compose(iteration(version, fresh))
    kept = composer.state_dict()["buffer"]["groups"]
    assert [saved.id for saved, _ in kept] == [21, 30, 31]
    read = GroupReplayBuffer()
    read.load_state_dict(saved_and_read(composer.buffer.state_dict(), tmp_path))
    assert ids(read.newest(9, 4)) == [30, 31, 21]
    short = GroupReplayBuffer(2)
    short.load_state_dict(composer.buffer.state_dict())
    assert ids(short.newest(9, 4)) == [30, 31]
