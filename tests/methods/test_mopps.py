"""MoPPS: the posterior by hand, its choices, and that only its state determines a draw."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.groups import group, response

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.methods.mopps import MoPPS

SHARP = 1e7  # after this many visits a posterior is practically a point


def started(sampler: MoPPS, problems: int = 40, seed: int = 1, rank: int = 0, ranks: int = 1) -> MoPPS:
    sampler.start(problems, seed, rank, ranks)
    return sampler


def answered(right: int, of: int) -> Group:
    return group(0, scores=[0.1 if i >= right else 1.0 for i in range(of)], accs=[float(i < right) for i in range(of)])


def sharp(rates: Sequence[float], **settings: Any) -> MoPPS:
    """Returns a sampler that knows the success rate of every problem."""
    sampler = started(MoPPS(candidates=100, **settings), len(rates))
    sampler.posterior = {place: (rate * SHARP, (1 - rate) * SHARP) for place, rate in enumerate(rates)}
    return sampler


def test_posterior_by_hand() -> None:
    sampler = started(MoPPS(discount=0.5))
    assert sampler.belief(7) == (1.0, 1.0)
    # 0.5 x 1 + 0.5 x 1 + 3 = 4 and 0.5 x 1 + 0.5 x 1 + 1 = 2
    sampler.observe([7], [answered(3, 4)])
    assert sampler.belief(7) == (4.0, 2.0)
    # 0.5 x 4 + 0.5 x 1 + 1 = 3.5 and 0.5 x 2 + 0.5 x 1 + 3 = 4.5
    sampler.observe([7], [answered(1, 4)])
    assert sampler.belief(7) == (3.5, 4.5)
    assert list(sampler.posterior) == [7]


def test_posterior_with_another_prior_by_hand() -> None:
    sampler = started(MoPPS(discount=0.25, prior=(2.0, 3.0)))
    # 0.25 x 2 + 0.75 x 2 + 0 = 2 and 0.25 x 3 + 0.75 x 3 + 2 = 5, then
    # 0.25 x 2 + 0.75 x 2 + 2 = 4 and 0.25 x 5 + 0.75 x 3 + 0 = 3.5
    sampler.observe([3, 3], [answered(0, 2), answered(2, 2)])
    assert sampler.belief(3) == (4.0, 3.5)


def test_discount_one_counts_everything() -> None:
    sampler = started(MoPPS(discount=1.0))
    sampler.observe([0] * 5, [answered(1, 4)] * 5)
    assert sampler.belief(0) == (6.0, 16.0)


def test_success_is_a_reward_component_above_a_bound() -> None:
    partial = group(0, scores=(0.1, 0.6, 1.0), accs=(0.0, 0.0, 1.0))
    by_acc, by_score = started(MoPPS()), started(MoPPS(success_key="score", success_above=0.5))
    by_acc.observe([0], [partial])
    by_score.observe([0], [partial])
    assert by_acc.belief(0) == (2.0, 3.0) and by_score.belief(0) == (3.0, 2.0)


def test_a_response_that_could_not_be_graded_is_wrong() -> None:
    failed = response(failure="timeout")
    failed.parts.clear()
    right = answered(2, 2)
    right.responses.append(failed)
    sampler = started(MoPPS())
    sampler.observe([0], [right])
    assert sampler.belief(0) == (3.0, 2.0)


def test_chooses_the_rates_nearest_to_the_target() -> None:
    rates = [0.02, 0.31, 0.49, 0.72, 0.97, 0.6]  # distances to one half: 0.48, 0.19, 0.01, 0.22, 0.47, 0.1
    assert sharp(rates).draw(4) == [2, 5, 1, 3]
    assert sharp(rates, target=0.9).draw(3) == [4, 3, 5]


def test_keeps_a_band_and_fills_up_with_the_nearest() -> None:
    rates = [0.02, 0.31, 0.49, 0.72, 0.97, 0.6]
    found = [sharp(rates, target_range=(0.3, 0.7)).draw(5)]
    sampler = sharp(rates, target_range=(0.3, 0.7))
    found += [sampler.draw(5) for _ in range(20)]
    # Inside the range: 1, 2 and 5 in random order. Then 3 (0.02 outside), then 4 (0.27 outside) and not 0 (0.28).
    assert all(set(places[:3]) == {1, 2, 5} and places[3:] == [3, 4] for places in found)
    assert len({tuple(places) for places in found}) > 3


def test_draws_its_guess_of_the_rate_anew() -> None:
    """Thompson sampling sometimes chooses an uncertain problem over one that is surely near the target."""
    sampler = started(MoPPS(candidates=2), 2)
    sampler.posterior = {0: (0.45 * SHARP, 0.55 * SHARP), 1: (1.0, 1.0)}
    chosen = [sampler.draw(1)[0] for _ in range(400)]
    # The uniform guess is nearer than 0.05 with probability 0.1.
    assert 20 <= chosen.count(1) <= 62


def test_candidates_bound_the_choice() -> None:
    """With one candidate for each place, the posterior cannot affect the choice."""
    sampler = started(MoPPS(candidates=1), 40)
    sampler.posterior = dict.fromkeys(range(20), (1.0, SHARP))
    hopeless = [sum(place < 20 for place in sampler.draw(10)) for _ in range(60)]
    assert 240 <= sum(hopeless) <= 360
    choosy = started(MoPPS(candidates=2), 40)
    choosy.posterior = dict(sampler.posterior)
    # Of 20 candidates out of 40, usually ten or more are not among the 20 hopeless ones.
    fewer = [sum(place < 20 for place in choosy.draw(10)) for _ in range(60)]
    assert 10 <= sum(fewer) <= 120


def test_a_draw_has_no_place_twice() -> None:
    sampler = started(MoPPS(), 40)
    for count in (1, 5, 40):
        places = sampler.draw(count)
        assert len(set(places)) == len(places) == count and set(places) <= set(range(40))


def test_asks_everything_where_more_is_wanted_than_there_is() -> None:
    places = started(MoPPS(), 5).draw(12)
    assert len(places) == 12 and {places.count(place) for place in range(5)} == {2, 3}


def test_ranks_share_the_places() -> None:
    samplers = [started(MoPPS(), 10, rank=rank, ranks=3) for rank in range(3)]
    drawn = [{place for _ in range(30) for place in sampler.draw(2)} for sampler in samplers]
    assert drawn == [{0, 3, 6, 9}, {1, 4, 7}, {2, 5, 8}]


def test_a_rank_without_problems_is_refused() -> None:
    for rank in range(4):  # all of them, or the first three would wait for the fourth
        with pytest.raises(SettingError, match="3 problems for 4 ranks"):
            started(MoPPS(), 3, rank=rank, ranks=4)


def asked(sampler: MoPPS, iterations: int, truth: random.Random) -> list[list[int]]:
    """Returns draws. After each, the sampler sees the answers: odd places are never right, even ones half the time."""
    found = []
    for _ in range(iterations):
        places = sampler.draw(6)
        right = [0 if place % 2 else sum(truth.random() < 0.5 for _ in range(8)) for place in places]
        sampler.observe(places, [answered(count, 8) for count in right])
        found.append(places)
    return found


def test_learns_what_is_worth_asking() -> None:
    sampler = started(MoPPS(), 60)
    found = asked(sampler, 40, random.Random(0))
    early, late = (
        sum(place % 2 for places in found[part] for place in places) for part in (slice(5), slice(-10, None))
    )
    assert early / 30 > 0.3 and late / 60 < 0.1


def test_resumes_exactly() -> None:
    whole = asked(started(MoPPS(), 60), 12, random.Random(3))
    first, truth = started(MoPPS(), 60), random.Random(3)
    before = asked(first, 5, truth)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = started(MoPPS(), 60)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert before + asked(second, 7, truth) == whole
    assert second.posterior.keys() >= first.posterior.keys() and second.draws == 12


def test_its_state_is_a_copy() -> None:
    sampler = started(MoPPS())
    sampler.observe([0], [answered(1, 2)])
    state = sampler.state_dict()
    sampler.observe([0], [answered(1, 2)])
    assert state["posterior"] == {0: (2.0, 2.0)}


def test_global_randomness_is_neither_read_nor_moved() -> None:
    random.seed(0)
    before, first = random.getstate(), started(MoPPS()).draw(8)
    assert random.getstate() == before
    random.seed(1)
    assert started(MoPPS()).draw(8) == first
    assert started(MoPPS(), seed=2).draw(8) != first
    sampler = started(MoPPS())
    assert sampler.draw(8) == first and sampler.draw(8) != first


@pytest.mark.parametrize(
    "settings",
    [
        {"candidates": 0},
        {"discount": 1.1},
        {"discount": -0.1},
        {"target": 1.5},
        {"target_range": (0.7, 0.3)},
        {"target_range": (0.3, 1.3)},
        {"prior": (0.0, 1.0)},
        {"prior": (1.0, -1.0)},
    ],
)
def test_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"^MoPPS.{next(iter(settings))} is "):
        MoPPS(**settings)
