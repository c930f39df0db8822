"""BAPO's three sources: fresh groups with different rewards, hard problems asked again, and recent good groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.problems import Problem
from popo_lightning.methods.bapo_buffer import BAPOBuffer
from popo_lightning.replay.composer import Iteration

K = 8


def right(id: int, count: int, version: int = 0, problem: str | None = None) -> Group:
    """Returns a group with `right` of K responses right. Partial scores make every group effective by score."""
    accs = [float(i < count) for i in range(K)]
    return group(id, version, problem, [acc + 0.01 * i for i, acc in enumerate(accs)], accs)


def at(
    version: int,
    fresh: Sequence[Group],
    again: dict[str, int] | None = None,
    seed: int = 0,
    asked: list[str] | None = None,
    **changes: Any,
) -> Iteration:
    """``again`` tells how many responses are right when a problem is asked again. Its groups count from 1000."""

    def given(problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None) -> list[Group]:
        assert n == K and prefixes is None
        if asked is not None:
            asked.extend(problem.id for problem in problems)
        assert again is not None, "asked again"
        return [right(1000 + i, again[problem.id], version, problem.id) for i, problem in enumerate(problems)]

    random: Callable[..., Random] = lambda *purpose: Random(f"{seed}/{version}/{purpose}")  # noqa: E731
    return iteration(version, fresh, given_problems=given, seeded=random, **changes)


def full(version: int, size: int = 8, first: int = 500) -> list[Group]:
    """Returns a batch that leaves every place free: all responses are right, so its groups are not X1, hard or good."""
    return [right(first + i, K, version) for i in range(size)]


# -- X1 ------------------------------------------------------------------------------------------------------------


def test_fresh_groups_that_differ_in_accuracy() -> None:
    fresh = [right(count, count) for count in range(K + 1)]
    assert ids(BAPOBuffer().compose(at(1, fresh))) == [1, 2, 3, 4, 5, 6, 7]  # 0/8 and 8/8 are effective by score


def test_the_bounds_are_one_response_whatever_the_rounding() -> None:
    """For K = 3, 1/3 is neither a float nor a mean of floats. Partial accuracies below one response do not count."""
    third = group(0, scores=(0.0, 0.0, 1.0))
    two_thirds = group(1, scores=(0.0, 1.0, 1.0))
    partial, nearly = group(2, scores=(0.0, 0.0, 0.5)), group(3, scores=(1.0, 1.0, 0.5))
    assert ids(BAPOBuffer().compose(at(1, [third, two_thirds, partial, nearly]))) == [0, 1]


def test_another_component() -> None:
    shaped = group(0, scores=(0.0, 1.0), accs=(0.0, 0.0))
    assert ids(BAPOBuffer(success_key="score").compose(at(1, [shaped]))) == [0]
    assert ids(BAPOBuffer().compose(at(1, [shaped]))) == []


# -- X2 ------------------------------------------------------------------------------------------------------------


def hard(count: int = 6, **settings: Any) -> BAPOBuffer:
    """Returns a composer that holds "problem 0" to "problem 5", each with no response right."""
    composer = BAPOBuffer(**settings)
    composer.compose(at(1, [right(i, 0, 1) for i in range(count)]))
    return composer


def test_hard_problems_are_asked_again_every_other_iteration() -> None:
    again = {f"problem {i}": i for i in range(6)}
    composer = hard()
    assert composer.compose(at(3, full(3))) == []  # 3 is odd: nothing may be asked
    groups = composer.compose(at(4, full(4), again))
    # Of 0 to 5 right, those above 1/8.
    assert sorted(group.problem.id for group in groups) == [f"problem {i}" for i in (2, 3, 4, 5)]
    assert all(each.id >= 1000 and each.version == 4 for each in groups)
    assert len(composer.compose(at(6, full(6), again))) == 4  # using a problem does not remove it
    assert BAPOBuffer(interval=3).interval == 3 and hard(interval=3).compose(at(4, full(4))) == []


@pytest.mark.parametrize(("count", "kept"), [(0, False), (1, False), (2, True), (7, True), (8, False)])
def test_strictly_between_c1_and_1(count: int, kept: bool) -> None:
    assert bool(hard(1).compose(at(2, full(2), {"problem 0": count}))) == kept


@pytest.mark.parametrize(("before", "now", "kept"), [(0, 1, True), (0, 8, True), (1, 1, False), (1, 0, False)])
def test_promotion_as_in_the_code(before: int, now: int, kept: bool) -> None:
    composer = BAPOBuffer(promote="improved")
    composer.compose(at(1, [right(0, before, 1)]))
    # another range, so that X3 does not take part
    composer.good = (0.9, 0.9)
    assert bool(composer.compose(at(2, full(2), {"problem 0": now}))) == kept


def test_no_more_than_told_nor_than_there_is_room() -> None:
    again = {f"problem {i}": 4 for i in range(6)}
    asked: list[str] = []
    assert len(hard(ask_again=2).compose(at(2, full(2), again, asked=asked))) == len(set(asked)) == 2
    fresh = [right(100 + i, 4, 2) for i in range(5)] + full(2, 3)
    asked.clear()
    groups = hard().compose(at(2, fresh, again, asked=asked))
    assert len(asked) == 6 and len(groups) == 8
    assert ids(groups[:5]) == [100, 101, 102, 103, 104]
    assert len(hard().compose(at(2, [right(100 + i, 4, 2) for i in range(8)]))) == 8  # no room: nothing is asked


def test_a_problem_of_this_batch_is_not_asked_again() -> None:
    asked: list[str] = []
    fresh = [right(100, 4, 2, "problem 3"), *full(2, 7)]
    groups = hard().compose(at(2, fresh, {f"problem {i}": 4 for i in range(6)}, asked=asked))
    assert "problem 3" not in asked and len(asked) == 5
    assert len({each.problem.id for each in groups}) == len(groups) == 6


def kept_problems(composer: BAPOBuffer) -> list[str]:
    return list(composer._hard)


def test_hard_problems_leave_first_in_first_out_or_when_solved() -> None:
    composer = BAPOBuffer(hard_capacity=3)
    composer.compose(at(1, [right(i, i % 3, 1) for i in range(6)]))  # 2 and 5 have 2 of 8 right
    assert kept_problems(composer) == ["problem 1", "problem 3", "problem 4"]
    composer.compose(at(3, [right(10, 2, 3, "problem 3"), right(11, 0, 3, "problem 1"), right(12, 1, 3)]))
    assert kept_problems(composer) == ["problem 4", "problem 1", "problem 12"]
    default = BAPOBuffer()
    default.compose(at(1, [right(i, 0, 1) for i in range(2)]))
    default.compose(at(3, [right(i, 0, 3) for i in (2, 3)]))
    assert kept_problems(default) == ["problem 2", "problem 3"]  # as many as an iteration samples


# -- X3 ------------------------------------------------------------------------------------------------------------


def good(*counts: int, version: int = 1, **settings: Any) -> BAPOBuffer:
    """Returns a composer that holds a group for each number of right answers."""
    composer = BAPOBuffer(hard=0.0, **settings)
    composer.compose(at(version, [right(i, count, version) for i, count in enumerate(counts)]))
    return composer


def test_stored_groups_in_the_range_fill_the_rest() -> None:
    groups = good(0, 1, 2, 3, 4, 8).compose(at(3, full(3)))
    assert sorted(ids(groups)) == [1, 2]  # 1/8 and 2/8, including both bounds


def test_at_most_three_versions_old() -> None:
    composer = good(1, 2)
    for version, count in ((3, 2), (4, 2), (5, 0)):
        assert len(composer.compose(at(version, full(version)))) == count  # using a group does not remove it
    assert not composer._good
    assert len(good(1, max_age=5).compose(at(6, full(6), {}))) == 1


def test_only_as_many_as_there_is_room_evenly_drawn() -> None:
    drawn: Counter[int] = Counter()
    for seed in range(200):
        fresh = [right(100 + i, 6, 3) for i in range(6)] + full(3, 2)
        groups = good(1, 1, 2, 2).compose(at(3, fresh, seed=seed))
        assert len(groups) == 8 and ids(groups[:6]) == list(range(100, 106))
        drawn.update(ids(groups[6:]))
    assert set(drawn) == {0, 1, 2, 3} and all(75 < count < 125 for count in drawn.values())


def test_no_problem_comes_twice() -> None:
    composer = BAPOBuffer()
    composer.compose(at(1, [right(0, 2, 1, "a"), right(1, 2, 1, "b"), right(2, 0, 1, "c")]))
    composer.compose(at(3, [right(3, 2, 3, "b"), right(4, 2, 3, "c"), right(5, 0, 3, "c")]))
    # Stored: a, b twice, c. Asked again: c, which the batch then has.
    groups = composer.compose(at(4, [right(6, 5, 4, "a"), *full(4, 6)], {"c": 4}))
    assert ids(groups) == [6, 1000, 3]  # the newest of b


def test_own_groups_do_not_fill_holes() -> None:
    composer = BAPOBuffer()
    assert ids(composer.compose(at(1, [right(0, 2, 1), right(1, 8, 1)]))) == [0]
    assert ids(composer.compose(at(3, full(3)))) == [0]


def test_fresh_groups_of_delayed_weights_are_fresh() -> None:
    """With data.weight_sync_interval 2 they have the version before, from which their age counts."""
    composer = BAPOBuffer()
    assert ids(composer.compose(at(1, [right(0, 2, 0), right(1, 8, 0)]))) == [0]
    assert ids(composer.compose(at(3, full(2)))) == [0]
    assert ids(composer.compose(at(4, full(4), {}))) == []


def test_a_bound_on_good_groups() -> None:
    composer = good(1, 2, 1, 2, good_capacity=3)
    assert sorted(ids(composer.compose(at(3, full(3))))) == [1, 2, 3]


@pytest.mark.parametrize(
    ("adaptive", "count", "expected"),
    [
        ("off", 2, [1, 2]),
        # r = 0.25: c2 = 0.125 + 0.25 * 0.375 = 0.21875, c3 = 0.25 + 0.25 * 0.375 = 0.34375
        ("prose", 2, [2]),
        # r = 0.75: 0.40625 to 0.53125
        ("prose", 6, [4]),
        # r = 1: 0.5 to 0.625
        ("prose", 8, [4, 5]),
        # r = 0.25 is (0.25 - 0.2) / 0.6 = 0.0833 of the way down: 0.5 - 0.03125 = 0.46875 to 0.59375
        ("code", 2, [4]),
        # r = 0.125 is below the range: 0.5 to 0.625
        ("code", 1, [4, 5]),
        # r = 0.875 is above it: 0.125 to 0.25
        ("code", 7, [1, 2]),
    ],
)
def test_thresholds_follow_the_mean_reward(adaptive: Any, count: int, expected: list[int]) -> None:
    composer = good(*range(9), adaptive=adaptive)
    # `count` of eight groups are all right, the others all wrong. They set r and leave every place free.
    groups = composer.compose(at(3, [right(100 + i, K if i < count else 0, 3) for i in range(8)]))
    assert sorted(ids(groups)) == expected


# -- the rest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resumes(stop: int, tmp_path: Path) -> None:
    def run(stop: int | None) -> list[list[int]]:
        composer, found = BAPOBuffer(good_capacity=6), []
        for version in range(10):
            if version == stop:
                torch.save(composer.state_dict(), tmp_path / "state.pt")
                composer = BAPOBuffer(good_capacity=6)
                composer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            fresh = [right(10 * version + i, (i + version) % 4 * (i % 2), version) for i in range(8)]
            again = {f"problem {i}": i % 5 for i in range(100)}
            found.append(ids(composer.compose(at(version, fresh, again))))
        return found

    whole = run(None)
    assert any(id >= 1000 for groups in whole for id in groups)
    assert any(id < 10 * version for version, groups in enumerate(whole) for id in groups)
    assert run(stop) == whole


def test_hard_problems_survive_a_checkpoint(tmp_path: Path) -> None:
    asked = Problem("p", [{"role": "user", "content": "<image> é"}], {"n": [1]}, {"level": 3}, ("a.png", b"\x89PNG"))
    composer = BAPOBuffer(promote="improved")
    composer._hard["p"] = (asked, 0.125)
    torch.save(composer.state_dict(), tmp_path / "state.pt")
    read = BAPOBuffer()
    read.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert read._hard == {"p": (asked, 0.125)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"hard": 1.5},
        {"good": (0.0, 0.5)},
        {"good": (0.5, 0.25)},
        {"good_high": (0.5, 1.0)},
        {"adaptive": "on"},
        {"interval": 0},
        {"ask_again": -1},
        {"promote": "never"},
        {"hard_capacity": 0},
        {"good_capacity": 0},
        {"max_age": 0},
    ],
)
def test_refuses(wrong: dict[str, Any]) -> None:
    (setting,) = wrong
    with pytest.raises(SettingError, match=f"BAPOBuffer.{setting} is "):
        BAPOBuffer(**wrong)
