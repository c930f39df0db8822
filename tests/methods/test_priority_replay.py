"""Replay by priority: FreshPER's priorities, which decay with age, and TRL's heap."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.methods.freshper import FreshPER
from popo_lightning.methods.score_priority import ScorePriority, spread_score
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.priorities import draw

DULL = (1.0, 1.0, 1.0, 1.0)
PAIR = (0.0, 1.0)  # A = -+0.5 / 0.70711
ONE_OF_FOUR = (0.0, 0.0, 0.0, 1.0)  # std 0.5; A = -0.5 three times and 1.5
TWO_OF_FOUR = (0.0, 0.0, 1.0, 1.0)


def resumed(composer: Composer, fresh: Composer, folder: Path) -> Composer:
    torch.save(composer.state_dict(), folder / "state.pt")
    fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return fresh


def at(version: int, fresh: Sequence[Group], seed: int = 0, **changes: Any) -> Iteration:
    random: Callable[..., Random] = lambda *purpose: Random(f"{seed}/{version}/{purpose}")  # noqa: E731
    return iteration(version, fresh, seeded=random, **changes)


# -- drawing -------------------------------------------------------------------------------------------------------


def test_draws_in_proportion_and_none_twice() -> None:
    """The weights are 1, 2, 3. First draws: 1/6, 2/6, 3/6. Pairs of 1 and 2: 1/6 * 2/5 + 2/6 * 1/4 = 0.15."""
    logs = [math.log(weight) for weight in (1, 2, 3)]
    random = Random(0)
    drawn = [draw(logs, 2, random) for _ in range(3000)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    first = Counter(pair[0] for pair in drawn)
    assert [first[i] / 3000 for i in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.03)
    assert sum(set(pair) == {0, 1} for pair in drawn) / 3000 == pytest.approx(0.15, abs=0.02)


def test_draws_all_where_there_are_fewer_and_never_underflows() -> None:
    assert sorted(draw([0.0, -1.0], 5, Random(0))) == [0, 1]
    assert draw([], 3, Random(0)) == [] == draw([0.0], 0, Random(0))
    drawn = Counter(draw([-1e5, -1e5 + math.log(3)], 1, Random(seed))[0] for seed in range(1000))  # exp of both is 0
    assert drawn[1] == pytest.approx(750, abs=45)


# -- FreshPER ------------------------------------------------------------------------------------------------------


def stocked(**settings: Any) -> FreshPER:
    """Returns a composer that holds group 1 of version 9 and group 2 of version 0."""
    composer = FreshPER(**{"tau": 10.0, "exponent": 0.5, "beta_iterations": 20} | settings)
    composer.compose(at(0, [group(2, 0, scores=ONE_OF_FOUR)]))
    composer.compose(at(9, [group(1, 9, scores=PAIR)]))
    return composer


def replayed(composer: FreshPER, version: int, seed: int = 0, num_problems: int = 1) -> list[Group]:
    fresh = [group(9, version, scores=DULL)] * num_problems
    return composer.compose(at(version, fresh, seed))[num_problems:]


def test_priorities_by_hand() -> None:
    """At version 10, ages 1 and 10, mean |A| 0.70711 and 0.75:

    p_1 = 0.70711 exp(-0.1) = 0.63982, p_2 = 0.75 exp(-1) = 0.27591; square roots 0.79989 and 0.52527; P_2 = 0.3964.
    """
    composer = stocked()
    drawn = Counter(replayed(composer, 10, seed)[0].id for seed in range(1500))
    assert drawn[2] / 1500 == pytest.approx(0.3964, abs=0.035)


def test_priorities_by_reward() -> None:
    """Mean |R| 0.5 and 0.25: p = 0.45242 and 0.09197; square roots 0.67262 and 0.30327; P_2 = 0.3108."""
    composer = stocked(base="reward")
    drawn = Counter(replayed(composer, 10, seed)[0].id for seed in range(1500))
    assert drawn[2] / 1500 == pytest.approx(0.3108, abs=0.035)


def test_a_priority_halves_every_tau_ln_2() -> None:
    composer = FreshPER(tau=10.0, exponent=1.0)
    young, old = group(1, 100, scores=PAIR), group(2, 93, scores=PAIR)  # 10 ln 2 = 6.93
    now = at(110, [])
    assert composer._log_priority(young, now) - composer._log_priority(old, now) == pytest.approx(0.7)
    assert math.exp(composer._log_priority(young, now)) == pytest.approx(0.70711 * math.exp(-1), rel=1e-4)


def test_importance_weights_by_hand() -> None:
    """The weights are (P_min / P_i)^beta, with P_2 / P_1 = 0.65668.

    At version 10 of 20, beta is 0.4 + 0.6 / 2; 0.65668^0.7 = 0.7450.
    """
    weights = {each.id: each.loss_weight for each in replayed(stocked(), 10, num_problems=2)}
    assert weights == {1: pytest.approx(0.7450, abs=1e-4), 2: 1.0}
    # With beta from 0 it is 0.5 at version 10, where sqrt(0.65668) = 0.81036, and 1 from version 20 on. Both groups age
    # alike, so the ratio of their priorities stays.
    for version, weight in ((10, 0.81036), (20, 0.65668), (30, 0.65668)):
        found = {each.id: each.loss_weight for each in replayed(stocked(beta=0.0), version, num_problems=2)}
        assert found == {1: pytest.approx(weight, abs=1e-4), 2: 1.0}


def test_the_greatest_weight_is_that_of_the_store_not_of_the_draw() -> None:
    """Group 2 sets the scale, whether it is drawn or not."""
    composer = stocked()
    alone = [found for seed in range(20) if (found := replayed(composer, 10, seed)[0]).id == 1]
    assert alone and all(found.loss_weight == pytest.approx(0.7450, abs=1e-4) for found in alone)


def test_weights_do_not_pile_up() -> None:
    composer = stocked()
    for _ in range(3):
        found = {each.id: each.loss_weight for each in replayed(composer, 10, num_problems=2)}
    assert found[1] == pytest.approx(0.7450, abs=1e-4)


def test_fresh_groups_come_first_unweighted_and_are_not_drawn_at_once() -> None:
    composer = FreshPER()
    first = [group(0), group(1), group(2, scores=(1.0, 1.0))]
    assert ids(composer.compose(at(0, first))) == [0, 1, 2]
    second = composer.compose(at(1, [group(i, 1) for i in (10, 11, 12)]))
    assert ids(second[:3]) == [10, 11, 12] and sorted(ids(second[3:])) == [0, 1]  # 2 is ineffective
    assert all(each.loss_weight == 1 for each in second[:3])


def test_several_batches_none_with_a_group_twice() -> None:
    composer = FreshPER(replay_batches=3)
    composer.compose(at(0, [group(i) for i in range(6)]))
    later = composer.compose(at(1, [group(i, 1) for i in range(10, 14)]))
    assert len(later) == 4 * 4
    batches = [ids(later[first : first + 4]) for first in (4, 8, 12)]
    assert all(len(set(batch)) == 4 for batch in batches)
    assert len({tuple(batch) for batch in batches}) == 3  # drawn anew


def test_first_in_first_out_and_what_is_stored() -> None:
    composer = FreshPER(capacity=3)
    composer.compose(at(0, [group(i) for i in range(5)]))
    assert ids(list(composer._groups)) == [2, 3, 4]
    every = FreshPER(effective_only=False, base="reward")
    every.compose(at(0, [group(0, scores=DULL), group(1, scores=(0.0, 0.0))]))
    assert len(every.compose(at(1, [group(2), group(3)]))) == 4  # a priority of 1e-6 can be drawn


def test_effective_by_another_part_decides() -> None:
    composer = FreshPER()
    shaped = group(0, scores=(0.0, 0.1), accs=(0.0, 0.0))
    composer.compose(at(0, [shaped], effective_key="acc"))
    assert not composer._groups


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_freshper_resumes(stop: int, tmp_path: Path) -> None:
    def run(stop: int | None) -> list[list[tuple[int, float]]]:
        composer: Composer = FreshPER(replay_batches=2, tau=3.0, capacity=9)
        found = []
        for version in range(8):
            if version == stop:
                composer = resumed(composer, FreshPER(replay_batches=2, tau=3.0, capacity=9), tmp_path)
            scores = [PAIR, ONE_OF_FOUR, DULL, TWO_OF_FOUR]
            fresh = [group(10 * version + i, version, scores=scores[(i + version) % 4]) for i in range(4)]
            found.append([(each.id, each.loss_weight) for each in composer.compose(at(version, fresh))])
        return found

    assert run(stop) == run(None)


def test_resumed_with_less_room_the_newest_stay(tmp_path: Path) -> None:
    composer = FreshPER()
    composer.compose(at(0, [group(i) for i in range(5)]))
    less = FreshPER(capacity=2)
    resumed(composer, less, tmp_path)
    assert ids(list(less._groups)) == [3, 4]


@pytest.mark.parametrize(
    "wrong",
    [
        {"replay_batches": 0},
        {"base": "td"},
        {"tau": 0.0},
        {"exponent": -0.1},
        {"beta": 1.5},
        {"beta_iterations": 0},
        {"capacity": 0},
    ],
)
def test_freshper_refuses(wrong: dict[str, Any]) -> None:
    (setting,) = wrong
    with pytest.raises(SettingError, match=f"FreshPER.{setting} is "):
        FreshPER(**wrong)


# -- TRL's heap ----------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """The sum of |R - mean| is 0.5 + 0.5; three times 0.25 + 0.75; four times 0.5.

    With 3 in place of 1 it is three times the second.
    """
    for scores, expected in ((PAIR, 1.0), (ONE_OF_FOUR, 1.5), (TWO_OF_FOUR, 2.0), ((0.0, 0.0, 0.0, 3.0), 4.5)):
        assert spread_score(torch.tensor(scores)) == pytest.approx(expected, rel=1e-4)


def numbers(composer: ScorePriority) -> list[int]:
    return sorted(each.id for _, _, each in composer._heap)


def test_the_best_stay() -> None:
    composer = ScorePriority(capacity=2)
    composer.compose(at(0, [group(0, scores=ONE_OF_FOUR), group(1, scores=PAIR), group(2, scores=TWO_OF_FOUR)]))
    assert numbers(composer) == [0, 2]
    composer.compose(at(1, [group(3, 1, scores=PAIR)]))
    assert numbers(composer) == [0, 2]


def test_of_equals_the_newcomer_is_refused_and_the_oldest_leaves() -> None:
    """If the heap held plain pairs of score and group, it would compare groups here and fail."""
    composer = ScorePriority(capacity=2)
    composer.compose(at(0, [group(i, scores=PAIR) for i in range(3)]))
    assert numbers(composer) == [0, 1]
    composer.compose(at(1, [group(3, 1, scores=TWO_OF_FOUR)]))
    assert numbers(composer) == [1, 3]


def test_ineffective_groups_give_way_to_stored_ones() -> None:
    composer = ScorePriority()
    composer.compose(at(0, [group(i, scores=PAIR) for i in range(3)]))
    groups = composer.compose(at(1, [group(10, 1, scores=DULL), group(11, 1), group(12, 1, scores=DULL)]))
    assert groups[0].id == 11 and len(groups) == 3
    assert set(ids(groups[1:])) < {0, 1, 2}  # two of them, none twice
    assert numbers(composer) == [0, 1, 2, 11]  # drawn groups stay
    assert ids(composer.compose(at(2, [group(20, 2)]))) == [20]  # no free place, no draw


def test_draws_in_proportion_to_score() -> None:
    """Scores 1, 1.5 and 2."""
    composer = ScorePriority()
    composer.compose(at(0, [group(i, scores=s) for i, s in enumerate((PAIR, ONE_OF_FOUR, TWO_OF_FOUR))]))
    hole = [group(9, 1, scores=DULL)]
    found = Counter(composer.compose(at(1, hole, seed))[0].id for seed in range(1500))
    assert [found[i] / 1500 for i in range(3)] == pytest.approx([1 / 4.5, 1.5 / 4.5, 2 / 4.5], abs=0.035)


def test_with_replacement_where_the_store_is_short() -> None:
    composer = ScorePriority()
    composer.compose(at(0, [group(0), group(1, scores=TWO_OF_FOUR)]))
    drawn = Counter(
        each.id for s in range(400) for each in composer.compose(at(1, [group(9, 1, scores=DULL)] * 3, seed=s))
    )
    assert sum(drawn.values()) == 1200
    assert drawn[1] / 1200 == pytest.approx(2 / 3, abs=0.04)


def test_an_empty_store_leaves_ineffective_groups() -> None:
    assert ids(ScorePriority().compose(at(0, [group(0, scores=DULL), group(1)]))) == [1, 0]


def test_own_groups_fill_holes_only_where_told() -> None:
    assert ids(ScorePriority(insert_first=True).compose(at(0, [group(0, scores=DULL), group(1)]))) == [1, 1]


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_score_priority_resumes(stop: int, tmp_path: Path) -> None:
    """This includes ties: equal scores leave in the order of their numbers, and draws follow the order of the heap."""

    def run(stop: int | None) -> list[list[int]]:
        composer: Composer = ScorePriority(capacity=5)
        found = []
        for version in range(8):
            if version == stop:
                composer = resumed(composer, ScorePriority(capacity=5), tmp_path)
            scores = [PAIR, DULL, ONE_OF_FOUR, DULL, TWO_OF_FOUR if version > 5 else PAIR, DULL]
            fresh = [group(10 * version + i, version, scores=each) for i, each in enumerate(scores)]
            found.append(ids(composer.compose(at(version, fresh))))
        return found

    assert run(stop) == run(None)


def test_resumed_with_less_room_the_best_stay(tmp_path: Path) -> None:
    composer = ScorePriority()
    composer.compose(at(0, [group(0, scores=TWO_OF_FOUR), group(1, scores=PAIR), group(2, scores=ONE_OF_FOUR)]))
    less = ScorePriority(capacity=2)
    resumed(composer, less, tmp_path)
    assert numbers(less) == [0, 2]
    less.compose(at(1, [group(3, 1, scores=TWO_OF_FOUR)]))
    assert numbers(less) == [0, 3]


def test_score_priority_refuses() -> None:
    with pytest.raises(SettingError, match=r"ScorePriority\.capacity is 0"):
        ScorePriority(0)
