"""POPO's ablations: the measure that ranks groups, which groups are replayed, and from what age."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration, response
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.methods.popo_ablations import AnyGroup, KLRanked, Stale, group_kl
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Iteration

DULL = (1.0, 1.0)  # scores of an ineffective group


def buffer_of(*groups: Group, capacity: int | None = 10, max_age: int | None = None) -> GroupReplayBuffer:
    buffer = GroupReplayBuffer(capacity, max_age)
    buffer.insert(groups, 10)
    return buffer


def saved_and_read(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def kept(composer: PrioritizedGroupReplay) -> list[int]:
    return [stored.id for stored, _ in composer.state_dict()["buffer"]["groups"]]


# -- KL-ranked -----------------------------------------------------------------------------------------------------


def moved_by(moves: dict[int, float], asked: list[list[int]] | None = None) -> Any:
    """Returns present log-probs that exceed the stored ones by a shift for each group id."""

    def present(groups: Sequence[Group]) -> list[list[Tensor]]:
        if asked is not None:
            asked.append(ids(groups))
        return [[r.behave_logp + moves[g.id] for r in g.responses] for g in groups]

    return present


def test_estimators_by_hand() -> None:
    responses = [response((1, 2), (-1.0, -2.0)), response((3,), (-0.5,))]
    present = [torch.tensor([-1.5, -1.0]), torch.tensor([-0.5])]
    # policy minus behave is -0.5, 1, 0. k1 is the mean of its negative.
    assert group_kl(responses, present, "k1") == pytest.approx((0.5 - 1 + 0) / 3)
    k3 = (math.exp(-0.5) - 1 + 0.5 + math.exp(1) - 1 - 1 + 0) / 3
    assert group_kl(responses, present, "k3") == pytest.approx(k3, rel=1e-6)
    # The mean is over tokens, not responses. With only the first response it is the mean of two.
    assert group_kl(responses[:1], present[:1], "k1") == pytest.approx(-0.25)


def test_estimators_stay_finite() -> None:
    far = [torch.tensor([400.0, -400.0])]
    stored = [response((1, 2), (0.0, 0.0))]
    assert group_kl(stored, far, "k1") == 0
    assert group_kl(stored, far, "k3") == pytest.approx((math.exp(20) - 21 + math.exp(-20) + 19) / 2)


def test_estimators_agree_with_the_divergence() -> None:
    """On many samples of behave they estimate KL(behave || policy). The reverse KL is another number."""
    torch.manual_seed(0)
    behave, policy = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    tokens = torch.multinomial(behave.exp(), 200_000, replacement=True)
    stored = [replace(response(), token_ids=tokens, behave_logp=behave[tokens])]
    right = float((behave.exp() * (behave - policy)).sum())
    wrong = float((policy.exp() * (policy - behave)).sum())
    assert abs(right - wrong) > 0.02
    for estimator in ("k1", "k3"):
        assert group_kl(stored, [policy[tokens]], estimator) == pytest.approx(right, abs=0.01)


def test_the_nearest_are_replayed_not_the_newest() -> None:
    composer = KLRanked(buffer_of(group(0, 1), group(1, 2), group(2, 3), group(3, 4)))
    moves = {0: 0.1, 1: -0.5, 2: 0.2, 3: 0.9}
    fresh = [group(10, 5), group(11, 5, scores=DULL), group(12, 5, scores=DULL)]
    assert ids(composer.compose(iteration(5, fresh, present_logprobs=moved_by(moves)))) == [10, 0, 2]
    assert kept(composer) == [0, 1, 2, 3, 10]
    # k3 ranks by distance. The lowest k1 have the groups that the policy has moved towards.
    composer = KLRanked(buffer_of(group(0, 1), group(1, 2), group(2, 3), group(3, 4)), estimator="k1")
    assert ids(composer.compose(iteration(5, fresh, present_logprobs=moved_by(moves)))) == [10, 3, 2]


def test_of_equally_near_groups_the_newest() -> None:
    composer = KLRanked(buffer_of(group(0, 1), group(1, 3), group(2, 2)))
    fresh = [group(10, 5, scores=DULL), group(11, 5, scores=DULL)]
    assert ids(composer.compose(iteration(5, fresh, present_logprobs=moved_by(dict.fromkeys(range(3), 0.1))))) == [1, 2]


def test_ranked_among_groups_of_an_allowed_age_with_no_problem_twice() -> None:
    stored = [group(0, 1), group(1, 3, "a"), group(2, 4, "b"), group(3, 4, "c"), group(4, 4, "b")]
    composer = KLRanked(buffer_of(*stored, max_age=2))
    asked: list[list[int]] = []
    moves = {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.4, 4: 0.3}
    fresh = [group(10, 5, "a"), group(11, 5, scores=DULL), group(12, 5, scores=DULL), group(13, 5, scores=DULL)]
    found = composer.compose(iteration(5, fresh, present_logprobs=moved_by(moves, asked)))
    # 0 is too old. a is in the batch, and b is in it after 2. So c comes before either, and then the nearer of them.
    assert ids(found) == [10, 2, 3, 1]
    assert asked == [[2, 3, 4, 1]]  # one pass over the candidates


def test_no_pass_where_there_is_nothing_to_choose() -> None:
    full = KLRanked(buffer_of(group(0, 4), group(1, 4)))
    assert ids(full.compose(iteration(5, [group(10, 5)]))) == [10]  # iteration() refuses log-probs
    short = KLRanked(buffer_of(group(0, 4), group(1, 3)))
    assert ids(short.compose(iteration(5, [group(10, 5, scores=DULL), group(11, 5, scores=DULL)]))) == [0, 1]


def test_own_groups_are_no_candidates() -> None:
    composer = KLRanked(buffer_of(group(0, 4), group(1, 4)))
    asked: list[list[int]] = []
    fresh = [group(10, 5), group(11, 5, scores=DULL)]
    moves = {0: 0.5, 1: 0.4, 10: 0.0}
    assert ids(composer.compose(iteration(5, fresh, present_logprobs=moved_by(moves, asked)))) == [10, 1]
    assert asked == [[0, 1]]


def test_bad_estimator_is_named() -> None:
    estimator: Any = "k2"
    with pytest.raises(SettingError, match="estimator is 'k2'"):
        KLRanked(GroupReplayBuffer(), estimator)


# -- any group -----------------------------------------------------------------------------------------------------


def test_random_places_go_to_the_newest_stored_groups_of_any_kind() -> None:
    stored = [group(0, 3), group(1, 4, scores=DULL), group(2, 4)]
    fresh = [group(10, 5), group(11, 5, scores=DULL), group(12, 5), group(13, 5, scores=DULL), group(14, 5)]
    left: set[int] = set()
    for seed in range(60):
        composer = AnyGroup(buffer_of(*stored))
        given = iteration(5, fresh, seeded=lambda *purpose, seed=seed: Random(f"{seed}/{purpose}"))
        found = ids(composer.compose(given))
        assert len(found) == 5 and found[3:] == [1, 2]  # two groups are ineffective, so two places are free
        assert found[:3] == sorted(found[:3])
        left |= set(range(10, 15)) - set(found)
        assert kept(composer) == [0, 1, 2, 10, 11, 12, 13, 14]  # all groups, effective or not
    assert left == set(range(10, 15))  # any place may be taken, also those of effective groups


def test_places_come_from_the_iterations_generator() -> None:
    def found(version: int) -> list[int]:
        fresh = [group(i, version, scores=DULL if i % 2 else (0.0, 1.0)) for i in range(12)]
        return ids(AnyGroup(buffer_of(*(group(20 + i, 0) for i in range(9)))).compose(iteration(version, fresh)))

    assert found(3) == found(3)
    assert found(3) != found(4)


def test_a_short_buffer_leaves_fresh_groups_in_their_places() -> None:
    fresh = [group(i, 5, scores=DULL) for i in range(10, 14)]
    assert ids(AnyGroup(buffer_of()).compose(iteration(5, fresh))) == [10, 11, 12, 13]
    found = ids(AnyGroup(buffer_of(group(0, 4))).compose(iteration(5, fresh)))
    assert len(found) == 4 and found[-1] == 0 and len(set(found) & {10, 11, 12, 13}) == 3


def test_another_share_of_places() -> None:
    fresh = [group(10 + i, 5) for i in range(4)]
    stored = [group(i, 4) for i in range(4)]
    for share, count in ((0.0, 0), (0.5, 2), (1.0, 4)):
        found = ids(AnyGroup(buffer_of(*stored), share).compose(iteration(5, fresh)))
        assert found[4 - count :] == [0, 1, 2, 3][:count]
        assert all(each >= 10 for each in found[: 4 - count])
    for bad in (-0.1, 1.1):
        with pytest.raises(SettingError, match=f"replaced is {bad}"):
            AnyGroup(buffer_of(), bad)


def test_problems_that_kept_their_places_come_last() -> None:
    fresh = [group(10, 5, "a"), group(11, 5, "a")]
    stored = [group(0, 4, "b"), group(1, 4, "a")]
    assert ids(AnyGroup(buffer_of(stored[1], stored[0]), 0.5).compose(iteration(5, fresh)))[1] == 0
    gone = [group(10, 5, "b"), group(11, 5, "a")]
    for version in range(5, 25):  # whichever stays, the other's problem is replaced
        found = AnyGroup(buffer_of(*stored), 0.5).compose(iteration(version, gone))
        assert {g.problem.id for g in found} == {"a", "b"}


# -- stale ---------------------------------------------------------------------------------------------------------


def test_the_newest_of_the_minimum_age() -> None:
    composer = Stale(buffer_of(*(group(i, version=i) for i in range(6)), capacity=20), min_age=3)
    fresh = [group(10, 6), group(11, 6, scores=DULL), group(12, 6, scores=DULL)]
    assert ids(composer.compose(iteration(6, fresh))) == [10, 3, 2]  # ages 3 and 4; 4 and 5 are too young
    assert kept(composer)[-1] == 10


def test_nothing_to_replay_before_the_minimum_age() -> None:
    composer = Stale(GroupReplayBuffer(None, None), min_age=3)
    sizes = []
    for version in range(7):
        fresh = [group(10 * version, version), group(10 * version + 1, version, scores=DULL)]
        sizes.append(ids(composer.compose(iteration(version, fresh))))
    assert sizes == [[0], [10], [20], [30, 0], [40, 10], [50, 20], [60, 30]]


def test_null_capacity_holds_the_worst_case() -> None:
    """All groups are effective for min_age iterations, then none: a whole batch of exactly that age is needed.

    The buffer holds it. POPO's buffer of one iteration would hold only groups that are too young, and would act as the
    filter.
    """
    composer, size = Stale(GroupReplayBuffer(None, None), min_age=4), 3
    for version in range(6):
        composer.compose(iteration(version, [group(10 * version + i, version) for i in range(size)]))
    assert len(kept(composer)) == 5 * size
    dull = [group(100 + i, 6, scores=DULL) for i in range(size)]
    assert ids(composer.compose(iteration(6, dull))) == [20, 21, 22]


def test_buffers_that_cannot_hold_the_age_are_refused() -> None:
    with pytest.raises(SettingError, match="max_age is 8, but groups are replayed at an age of 10"):
        Stale(GroupReplayBuffer(None, 8), min_age=10)
    Stale(GroupReplayBuffer(None, 10), min_age=10)
    with pytest.raises(SettingError, match="min_age is 0"):
        Stale(GroupReplayBuffer(None, None), min_age=0)
    fresh = [group(0, 0), group(1, 0)]
    with pytest.raises(SettingError, match=r"capacity is 7, but groups 3 versions old .* may need 8 at 2 problems"):
        Stale(GroupReplayBuffer(7, None), min_age=3).compose(iteration(0, fresh))
    assert ids(Stale(GroupReplayBuffer(8, None), min_age=3).compose(iteration(0, fresh))) == [0, 1]


def test_minimum_age_of_one_is_popo() -> None:
    def run(composer: PrioritizedGroupReplay) -> list[list[int]]:
        return [ids(composer.compose(a_batch(version))) for version in range(8)]

    assert run(Stale(GroupReplayBuffer(20, 8), min_age=1)) == run(PrioritizedGroupReplay(GroupReplayBuffer(20, 8)))


# -- checkpoints ---------------------------------------------------------------------------------------------------


def a_batch(version: int) -> Iteration:
    """Returns an iteration of four groups, some of them effective. The id decides how near stored groups are."""
    fresh = [
        group(10 * version + i, version, f"p{(version * 4 + i) % 7}", DULL if (version + i) % 3 else (0.0, 1.0))
        for i in range(4)
    ]
    return iteration(version, fresh, present_logprobs=moved_by({i: (i * 7 % 11) / 10 for i in range(200)}))


@pytest.mark.parametrize(
    "composer",
    [
        lambda: KLRanked(GroupReplayBuffer(6, 4)),
        lambda: AnyGroup(GroupReplayBuffer(6, 4)),
        lambda: Stale(GroupReplayBuffer(None, None), min_age=2),
    ],
)
def test_resumed_composer_goes_on_as_if_nothing_had_been(composer: Any, tmp_path: Path) -> None:
    whole, first, rest = composer(), composer(), composer()
    expected = [ids(whole.compose(a_batch(version))) for version in range(9)]
    assert [ids(first.compose(a_batch(version))) for version in range(4)] == expected[:4]
    assert kept(first)
    rest.load_state_dict(saved_and_read(first.state_dict(), tmp_path))
    assert [ids(rest.compose(a_batch(version))) for version in range(4, 9)] == expected[4:]
    without = composer()
    assert [ids(without.compose(a_batch(version))) for version in range(4, 9)] != expected[4:]
