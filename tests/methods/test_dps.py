"""DPS: the filter by hand and against exact Bayes, its choices, and that only its state determines a draw."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from helpers.groups import group, response

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.methods.dps import DPS, MIXED, RIGHT, WRONG
from popo_lightning.methods.mopps import MoPPS
from popo_lightning.tasks.samplers import EpochSampler, PromptSampler

ACCS = {WRONG: (0.0, 0.0), MIXED: (0.0, 1.0), RIGHT: (1.0, 1.0)}
THIRD = [1 / 3] * 3


def started(sampler: DPS, problems: int = 40, seed: int = 1, rank: int = 0, ranks: int = 1) -> DPS:
    sampler.start(problems, seed, rank, ranks)
    return sampler


def seen(state: int) -> Group:
    return group(0, scores=[0.3, 0.7], accs=ACCS[state])


def visit(sampler: DPS, *states: int | None, place: int = 0, other: int = 9) -> DPS:
    """Runs steps that show a problem's state. For None they show another problem's."""
    for state in states:
        sampler.observe([other if state is None else place], [seen(WRONG if state is None else state)])
    return sampler


def test_first_visit_by_hand() -> None:
    sampler = visit(started(DPS(discount=0.5)), MIXED, place=7)
    # From an unknown state, the row of mixed gets a third of a count in each column. The discount keeps counts of one
    # at one.
    assert sampler.counts[7].tolist() == [pytest.approx(row) for row in ([1, 1, 1], [4 / 3] * 3, [1, 1, 1])]
    # From mixed: 1, 4/3, 1 over 10/3.
    assert sampler.belief(7) == pytest.approx([0.3, 0.4, 0.3])
    assert sampler.belief(8) == THIRD and int(sampler.asked.sum()) == 1


def test_second_visit_by_hand() -> None:
    sampler = visit(started(DPS(discount=0.5)), MIXED, RIGHT, place=7)
    # Counts go halfway back to one, and one whole count is added from mixed to right.
    assert sampler.counts[7].tolist() == [pytest.approx(row) for row in ([1, 1, 1], [7 / 6] * 3, [1, 2, 1])]
    # From right: 1, 7/6, 1 over 19/6.
    assert sampler.belief(7) == pytest.approx([6 / 19, 7 / 19, 6 / 19])


def test_a_step_without_a_visit_by_hand() -> None:
    sampler = visit(started(DPS(discount=0.5)), MIXED, None, place=7)
    # Counts fall halfway to the prior and gain nothing, so columns are 1, 7/6, 1. The state changes by P, in which all
    # columns are equal.
    assert sampler.counts[7].tolist() == [pytest.approx(row) for row in ([1, 1, 1], [7 / 6] * 3, [1, 1, 1])]
    assert sampler.belief(7) == pytest.approx([6 / 19, 7 / 19, 6 / 19])
    # The prediction for the step counts as its posterior: (0.3, 0.4, 0.3) moves to mixed by 7/19 each.
    visit(sampler, MIXED, place=7)
    prior_part = 0.5 * torch.tensor([1, 7 / 6, 1]) + 0.5
    assert sampler.counts[7][MIXED].tolist() == pytest.approx((prior_part[1] + torch.tensor([0.3, 0.4, 0.3])).tolist())


def test_discount_zero_keeps_the_prior_and_the_last_count() -> None:
    sampler = visit(started(DPS(discount=0.0, prior=2.0)), MIXED, RIGHT, RIGHT, WRONG)
    expected = torch.full((3, 3), 2.0, dtype=torch.float64)
    expected[WRONG, RIGHT] += 1
    torch.testing.assert_close(sampler.counts[0], expected)
    visit(sampler, None)
    assert sampler.counts[0].tolist() == [[2.0] * 3] * 3 and sampler.belief(0) == pytest.approx(THIRD)


def test_discount_one_counts_everything_and_a_known_problem_drifts() -> None:
    sampler = visit(started(DPS(discount=1.0)), RIGHT, *[RIGHT] * 6)
    # The first visit added a third to column right, and six more add one each: 1, 1, 1 + 1/3 + 6 over 3 + 1/3 + 6.
    assert sampler.belief(0) == pytest.approx([3 / 28, 3 / 28, 22 / 28])
    before = sampler.counts[0].clone()
    visit(sampler, None, None)
    assert torch.equal(sampler.counts[0], before)
    assert sampler.belief(0)[RIGHT] < 22 / 28


def every_path(chain: torch.Tensor, shown: Sequence[int | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Enumerates paths. Returns probabilities of the state after the last step, and of the last transition [to, from].

    The chain is known. The three states before the first step are equally likely. Some steps show the state.
    """
    ahead, last = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for path in product(range(3), repeat=len(shown) + 2):
        if all(state in (None, path[step + 1]) for step, state in enumerate(shown)):
            chance = math.prod(float(chain[to, of]) for of, to in pairwise(path)) / 3
            ahead[path[-1]] += chance
            last[path[-2], path[-3]] += chance
    return ahead / ahead.sum(), last / last.sum()


CHAIN = torch.tensor([[0.80, 0.15, 0.02], [0.15, 0.60, 0.28], [0.05, 0.25, 0.70]], dtype=torch.float64)


@pytest.mark.parametrize(
    "shown",
    [
        (MIXED,),
        (WRONG, None),
        (RIGHT, None, None, MIXED),
        (MIXED, RIGHT, None, None),
        (None, WRONG, None, WRONG, MIXED),
    ],
)
def test_the_state_is_exact_where_the_chain_is_known(shown: tuple[int | None, ...]) -> None:
    """Compares with an enumeration of paths. With a hundred million counts of the chain, single ones do not matter."""
    sampler = started(DPS(discount=1.0))
    sampler.counts[0] = 1e8 * CHAIN
    sampler.asked[0] = True
    visit(sampler, *shown)
    ahead, last = every_path(CHAIN, shown)
    assert sampler.belief(0) == pytest.approx(ahead.tolist(), abs=1e-6)
    if shown[-1] is not None:  # the last counts are the last transition's probabilities
        fresh = started(DPS(discount=1.0))
        fresh.counts[0], fresh.asked[0] = 1e8 * CHAIN, True
        counted = sampler.counts[0] - visit(fresh, *shown[:-1]).counts[0]
        torch.testing.assert_close(counted, last, atol=1e-6, rtol=0)


@pytest.mark.parametrize("states", [(MIXED, MIXED), (MIXED, RIGHT, RIGHT, MIXED, WRONG), (0, 1, 2, 0, 1, 2, 0)])
def test_an_unknown_chain_is_exact_where_every_step_was_shown(states: tuple[int, ...]) -> None:
    """Compares with the chance of each next state, integrated over all chains.

    This chance is a ratio of products of Pochhammer symbols. With Dirichlet(1, 1, 1) columns a sequence has the chance
    prod over columns of prod n_ij! * 2! / (n_j + 2)!.
    """

    def chance(sequence: Sequence[int]) -> float:
        total = 1.0
        for of in range(3):
            counts = [sum(pair == (of, to) for pair in pairwise(sequence)) for to in range(3)]
            total *= 2 * math.prod(map(math.factorial, counts)) / math.factorial(sum(counts) + 2)
        return total

    sampler = started(DPS(discount=1.0))
    sampler.posterior[0] = torch.eye(3, dtype=torch.float64)[states[0]]  # the state before the first step is known
    sampler.asked[0] = True
    visit(sampler, *states[1:])
    expected = [chance([*states, after]) / chance(states) for after in range(3)]
    assert sampler.belief(0) == pytest.approx(expected, abs=1e-12)


def test_state_is_of_a_reward_component_above_a_bound() -> None:
    partial = group(0, scores=(0.1, 0.6, 1.0), accs=(0.0, 0.0, 0.0))
    by_acc, by_score = started(DPS()), started(DPS(success_key="score"))
    low = started(DPS(success_key="score", success_above=0.0))
    for sampler in (by_acc, by_score, low):
        sampler.observe([0], [partial])
    found = [sampler.posterior[0].tolist().index(1.0) for sampler in (by_acc, by_score, low)]
    assert found == [WRONG, MIXED, RIGHT]


def test_a_response_that_could_not_be_graded_is_wrong() -> None:
    failed = response(failure="timeout")
    failed.parts.clear()
    right = seen(RIGHT)
    right.responses.append(failed)
    sampler = started(DPS())
    sampler.observe([0], [right])
    assert sampler.posterior[0].tolist() == [0, 1, 0]


def test_groups_of_one_problem_in_one_call_are_one_visit() -> None:
    twice, once = started(DPS()), visit(started(DPS()), MIXED)
    twice.observe([0, 0], [seen(WRONG), seen(RIGHT)])
    assert torch.equal(twice.counts, once.counts) and twice.belief(0) == once.belief(0)
    twice.observe([], [])
    assert torch.equal(twice.counts, once.counts)


def expecting(mixed: Sequence[float], **settings: Any) -> DPS:
    """Returns a sampler that predicts mixed with the given probabilities, and all wrong otherwise."""
    sampler = started(DPS(candidates=100, **settings), len(mixed))
    sampler.prediction = torch.tensor([[1 - chance, chance, 0.0] for chance in mixed], dtype=torch.float64)
    return sampler


def test_chooses_what_is_most_likely_mixed() -> None:
    assert expecting([0.02, 0.31, 0.49, 0.72, 0.97, 0.6]).draw(4) == [4, 3, 5, 2]


def test_entropy_counts_by_its_weight() -> None:
    chances = [0.5, 0.7, 0.95, 0.0]  # entropies 0.693, 0.611, 0.199, 0 nats
    assert expecting(chances).draw(3) == [2, 1, 0]
    assert expecting(chances, entropy_weight=0.5).draw(3) == [2, 1, 0]  # 0.846, 1.005, 1.049
    assert expecting(chances, entropy_weight=1.0).draw(3) == [1, 0, 2]  # 1.193, 1.311, 1.149


def test_ties_go_by_the_seed_and_not_by_the_place() -> None:
    drawn = [tuple(started(DPS(candidates=100), 60, seed).draw(6)) for seed in range(40)]
    assert len(set(drawn)) == 40
    places = [place for each in drawn for place in each]
    assert 24 <= sum(place < 6 for place in places) * 60 / 36 <= 60  # at least a tenth of 240, but not all
    assert started(DPS(candidates=100), 60, 3).draw(6) == list(drawn[3])
    tied = started(DPS(candidates=100), 30)
    tied.observe(range(20), [seen(MIXED)] * 20)
    firsts = [tied.draw(5) for _ in range(20)]
    assert len({tuple(each) for each in firsts}) == 20 and all(place < 20 for each in firsts for place in each)


def test_candidates_bound_the_choice() -> None:
    """With one candidate for each place, predictions cannot affect the choice."""
    sampler = started(DPS(candidates=1), 40)
    sampler.prediction = torch.tensor([[1.0, 0.0, 0.0]] * 20 + [[0.0, 1.0, 0.0]] * 20, dtype=torch.float64)
    assert 240 <= sum(place < 20 for _ in range(60) for place in sampler.draw(10)) <= 360
    sampler.candidates = 4
    assert not any(place < 20 for _ in range(60) for place in sampler.draw(10))


def test_a_draw_has_no_place_twice() -> None:
    sampler = started(DPS(), 40)
    for count in (1, 5, 40):
        places = sampler.draw(count)
        assert len(set(places)) == len(places) == count and set(places) <= set(range(40))


def test_asks_everything_where_more_is_wanted_than_there_is() -> None:
    places = started(DPS(), 5).draw(12)
    assert len(places) == 12 and {places.count(place) for place in range(5)} == {2, 3}


def test_ranks_share_the_places() -> None:
    samplers = [started(DPS(), 10, rank=rank, ranks=3) for rank in range(3)]
    drawn = [{place for _ in range(30) for place in sampler.draw(2)} for sampler in samplers]
    assert drawn == [{0, 3, 6, 9}, {1, 4, 7}, {2, 5, 8}]
    visit(samplers[1], MIXED, place=7)
    assert samplers[1].belief(7) == pytest.approx([0.3, 0.4, 0.3])
    for rank in range(4):  # all of them, or the first three would wait for the fourth
        with pytest.raises(SettingError, match="3 problems for 4 ranks"):
            started(DPS(), 3, rank=rank, ranks=4)


def mixed_share(sampler: PromptSampler, seed: int) -> float:
    """Returns the share of mixed groups.

    Each problem's log-odds rises at its own pace, so problems are learned one after another.
    """
    truth, batch, iterations = random.Random(f"{seed}/truth"), 16, 50
    begin = [truth.uniform(-8, 5) for _ in range(200)]
    pace = [truth.uniform(0, 0.2) for _ in range(200)]
    sampler.start(200, seed, 0, 1)
    mixed = 0
    for iteration in range(iterations):
        places = sampler.draw(batch)
        odds = [begin[place] + pace[place] * iteration for place in places]
        accs = [[float(truth.random() < 1 / (1 + math.exp(-each))) for _ in range(8)] for each in odds]
        mixed += sum(0 < sum(of) < 8 for of in accs)
        sampler.observe(places, [group(0, iteration, scores=of) for of in accs])
    return mixed / (batch * iterations)


def test_finds_more_mixed_groups_than_mopps_and_uniform() -> None:
    """The success of the problems drifts. For each of four seeds, the rules have the same candidates and discount."""
    rules: dict[str, Callable[[], PromptSampler]] = {"dps": DPS, "mopps": MoPPS, "uniform": EpochSampler}
    found = {name: [mixed_share(rule(), seed) for seed in range(4)] for name, rule in rules.items()}
    for dps, mopps, uniform in zip(*found.values(), strict=True):
        assert dps > mopps + 0.02 and mopps > uniform + 0.1, found


def asked(sampler: DPS, iterations: int, truth: random.Random) -> list[list[int]]:
    """Returns draws. After each, the sampler sees the states that the problems would show."""
    found = []
    for _ in range(iterations):
        places = sampler.draw(6)
        sampler.observe(places, [seen(WRONG if place % 2 else truth.choice((MIXED, RIGHT))) for place in places])
        found.append(places)
    return found


def test_resumes_exactly() -> None:
    whole = asked(started(DPS(), 60), 12, random.Random(3))
    first, truth = started(DPS(), 60), random.Random(3)
    before = asked(first, 5, truth)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = started(DPS(), 60)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert before + asked(second, 7, truth) == whole and second.draws == 12


def test_its_state_does_not_move_with_it() -> None:
    sampler = visit(started(DPS()), MIXED)
    state = sampler.state_dict()
    kept = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    visit(sampler, MIXED, RIGHT, place=3)
    assert set(kept) == {"counts", "posterior", "prediction", "asked"}
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert not torch.equal(sampler.counts, state["counts"])


def test_global_randomness_is_neither_read_nor_moved() -> None:
    random.seed(0)
    before, first = random.getstate(), started(DPS()).draw(8)
    assert random.getstate() == before
    random.seed(1)
    assert started(DPS()).draw(8) == first
    assert started(DPS(), seed=2).draw(8) != first


@pytest.mark.parametrize(
    "settings",
    [
        {"candidates": 0},
        {"discount": 1.1},
        {"discount": -0.1},
        {"prior": 0.0},
        {"prior": math.inf},
        {"entropy_weight": -0.1},
    ],
)
def test_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"^DPS.{next(iter(settings))} is "):
        DPS(**settings)
