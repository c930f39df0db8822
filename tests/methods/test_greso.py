"""GRESO: skip probabilities and steering by hand, the order of a pass, and exact resuming."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch
from helpers.groups import group

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.methods.greso import GRESO
from popo_lightning.tasks.samplers import EpochSampler

SCORES = {"easy": (1.0, 1.0), "hard": (0.0, 0.0), "spread": (0.0, 1.0)}


def started(sampler: GRESO, problems: int = 40, seed: int = 1, rank: int = 0, ranks: int = 1) -> GRESO:
    sampler.start(problems, seed, rank, ranks)
    return sampler


def seen(kind: str, version: int = 0) -> Group:
    return group(0, version, scores=SCORES[kind])


def test_is_the_plain_order_until_something_is_skipped() -> None:
    plain, sampler = EpochSampler(), started(GRESO(), 30)
    plain.start(30, 1, 0, 1)
    assert [sampler.draw(7) for _ in range(9)] == [plain.draw(7) for _ in range(9)]


def test_skip_probability_by_hand() -> None:
    sampler = started(GRESO(p_easy=0.5, p_hard=0.8))
    assert sampler.skip_probability(3) == 0
    # 1 - 0.5, 1 - 0.25, 1 - 0.125; after seven times 0.5^7 = 0.008 is below 0.01
    for expected in (0.5, 0.75, 0.875):
        sampler.observe([3], [seen("easy")])
        assert sampler.skip_probability(3) == pytest.approx(expected)
    sampler.observe([3] * 4, [seen("easy")] * 4)
    assert sampler.skip_probability(3) == pytest.approx(0.99)
    sampler.observe([4, 4], [seen("hard")] * 2)
    assert sampler.skip_probability(4) == pytest.approx(1 - 0.64)


def test_counts_only_what_comes_in_a_row() -> None:
    sampler = started(GRESO())
    sampler.observe([0] * 3, [seen("hard"), seen("hard"), seen("spread")])
    assert sampler.useless == {} and sampler.skip_probability(0) == 0
    sampler.observe([0] * 3, [seen("hard"), seen("hard"), seen("easy")])
    assert sampler.useless == {0: ("easy", 1)}


def test_easy_and_hard() -> None:
    sampler = started(GRESO())
    scores = [(1.0, 1.0), (0.98, 0.98), (0.97, 0.97), (0.1, 0.1, 0.1), (0.0, 0.0), (0.0, 0.1)]
    sampler.observe(range(6), [group(0, scores=each) for each in scores])
    assert {place: kind for place, (kind, _) in sampler.useless.items()} == {
        0: "easy",
        1: "easy",
        2: "hard",
        3: "hard",
        4: "hard",
    }


def test_one_success_in_sixteen_is_no_hard_problem() -> None:
    sampler = started(GRESO())
    sampler.observe([0], [group(0, scores=[1.0] + [0.0] * 15)])
    assert sampler.useless == {}


def test_reward_component() -> None:
    partial = group(0, scores=(0.0, 0.1), accs=(0.0, 0.0))
    by_score, by_acc = started(GRESO()), started(GRESO(reward_key="acc"))
    by_score.observe([0], [partial])
    by_acc.observe([0], [partial])
    assert by_score.useless == {} and by_acc.useless == {0: ("hard", 1)}


def test_skips_as_often_as_it_says() -> None:
    sampler = started(GRESO(p_hard=0.3), 100)
    sampler.useless = dict.fromkeys(range(50), ("hard", 1))
    drawn = [place for _ in range(40) for place in sampler.draw(50)]
    passes = sampler.order.cursor / 100
    useless = sum(place < 50 for place in drawn)
    # 50 places are drawn with 0.3 per pass, and the other 50 in every pass.
    assert useless / passes == pytest.approx(15, abs=2)
    assert (len(drawn) - useless) / passes == pytest.approx(50, abs=2)


def test_asks_on_when_everything_is_useless() -> None:
    sampler = started(GRESO(), 10)
    sampler.useless = dict.fromkeys(range(10), ("easy", 50))
    assert len(sampler.draw(20)) == 20
    assert sampler.order.cursor > 500  # about one in a hundred is drawn


def steered(kinds: list[str], **settings: Any) -> GRESO:
    """Returns a sampler after one iteration in the second pass. The first group of the next iteration ends that one."""
    sampler = started(GRESO(**settings), len(kinds))
    sampler.draw(len(kinds))
    sampler.observe(range(len(kinds)), [seen("spread")] * len(kinds))
    sampler.draw(len(kinds))
    sampler.observe(range(len(kinds)), [seen(kind, 1) for kind in kinds])
    sampler.observe([0], [seen("spread", 2)])
    return sampler


def test_steering_by_hand() -> None:
    # The targets are 0.25 / 3 = 0.083 easy and 0.167 hard. At version 0 the second pass had not begun.
    more = steered(["easy"] + ["hard"] + ["spread"] * 8)
    assert more.p == pytest.approx({"easy": 0.49, "hard": 0.51})  # 0.1 is enough for easy, too little for hard
    fewer = steered(["hard"] * 2 + ["spread"] * 8)
    assert fewer.p == pytest.approx({"easy": 0.51, "hard": 0.49})


def test_steering_reaches_its_target_at_equality() -> None:
    assert steered(["easy"] + ["spread"] * 3, target=0.5, easy_part=0.5).p["easy"] == pytest.approx(0.49)


def test_steering_stays_in_bounds() -> None:
    kinds = ["easy"] * 5 + ["spread"] * 5
    sampler = steered(kinds, p_easy=0.05, p_hard=0.95)
    assert sampler.p == {"easy": 0.05, "hard": 0.95}


def test_the_first_pass_moves_nothing() -> None:
    sampler = started(GRESO(), 20)
    for version in range(2):
        places = sampler.draw(10)
        sampler.observe(places, [seen("hard", version)] * 10)
    assert sampler.p == {"easy": 0.5, "hard": 0.5}


def test_an_iteration_of_several_draws_is_one_step() -> None:
    sampler = started(GRESO(), 10)
    sampler.draw(11)
    for _ in range(3):
        sampler.observe([0, 1], [seen("hard", 4), seen("spread", 4)])
    assert sampler.p["hard"] == 0.5
    sampler.observe([1], [seen("spread", 5)])
    assert sampler.p == pytest.approx({"easy": 0.51, "hard": 0.49})
    sampler.observe([1], [seen("spread", 5)])
    assert sampler.p == pytest.approx({"easy": 0.51, "hard": 0.49})


def test_every_iteration_is_counted_by_itself() -> None:
    sampler = started(GRESO(), 10)
    sampler.draw(11)
    for version, kind in ((1, "hard"), (2, "spread"), (3, "spread")):
        sampler.observe(range(5), [seen(kind, version)] * 5)
    assert sampler.p["hard"] == pytest.approx(0.5)  # down after version 1, up again after version 2


def test_ranks_share_the_places() -> None:
    samplers = [started(GRESO(), 10, rank=rank, ranks=3) for rank in range(3)]
    drawn = [{place for _ in range(6) for place in sampler.draw(2)} for sampler in samplers]
    assert drawn == [{0, 3, 6, 9}, {1, 4, 7}, {2, 5, 8}]
    for rank in range(4):  # all of them, or the first three would wait for the fourth
        with pytest.raises(SettingError, match="3 problems for 4 ranks"):
            started(GRESO(), 3, rank=rank, ranks=4)


def asked(sampler: GRESO, iterations: int, first: int = 0) -> list[list[int]]:
    """Returns draws. By place, a third of the answers are easy, a third hard, and a third have a spread."""
    found = []
    for version in range(first, first + iterations):
        for _ in range(2):
            places = sampler.draw(6)
            sampler.observe(places, [seen(("easy", "hard", "spread")[place % 3], version) for place in places])
            found.append(places)
    return found


def test_asks_less_of_what_is_useless() -> None:
    found = asked(started(GRESO(), 30), 60)
    late = [place % 3 for places in found[-40:] for place in places]
    assert late.count(2) / len(late) > 0.7 > 0.4 > sum(p % 3 == 2 for places in found[:5] for p in places) / 30


def test_resumes_exactly() -> None:
    whole = asked(started(GRESO(), 30), 20)
    first = started(GRESO(), 30)
    before = asked(first, 9)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = started(GRESO(), 30)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.p == first.p != {"easy": 0.5, "hard": 0.5}
    assert before + asked(second, 11, 9) == whole


def test_a_second_run_begins_anew() -> None:
    sampler = started(GRESO(), 30)
    first = asked(sampler, 10)
    assert asked(started(sampler, 30), 10) == first


def test_global_randomness_is_neither_read_nor_moved() -> None:
    random.seed(0)
    before, first = random.getstate(), asked(started(GRESO(), 30), 5)
    assert random.getstate() == before
    random.seed(1)
    assert asked(started(GRESO(), 30), 5) == first != asked(started(GRESO(), 30, seed=2), 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"p_easy": 0.01},
        {"p_hard": 0.99},
        {"target": 1.2},
        {"easy_part": -0.1},
        {"step": -0.01},
        {"bounds": (0.9, 0.1)},
        {"bounds": (0.0, 0.9)},
        {"min_probability": 0.0},
        {"min_probability": 1.1},
    ],
)
def test_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"^GRESO.{next(iter(settings))} is "):
        GRESO(**settings)
