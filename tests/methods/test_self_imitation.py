"""SPEAR: which responses are kept, when they are replayed, and what advantage they then have."""

from __future__ import annotations

from dataclasses import replace
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration
from helpers.tiny_models import fit

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.methods.spear import SPEAR
from popo_lightning.objectives.advantages import GroupNormalized
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.weights import NoCorrection

HARD = (1.0, 0.0, 0.0, 0.0)  # unbiased std 0.5: standardised 1.5 and -0.5
EVEN = (1.0, 1.0, 0.0, 0.0)  # std 0.577: 0.866
WRONG = (0.0, 0.0, 0.0, 0.0)


def marked(id: int, version: int, scores: tuple[float, ...]) -> Group:
    """Returns a group of responses whose first token is 100 * id + place."""
    made = group(id, version, None, scores)
    answers = [replace(r, token_ids=torch.tensor([100 * id + i, 1])) for i, r in enumerate(made.responses)]
    return replace(made, responses=answers)


def compose(composer: SPEAR, version: int, *fresh: Group) -> list[Group]:
    return composer.compose(iteration(version, fresh))


def marks(groups: list[Group]) -> list[list[int]]:
    return [[int(r.token_ids[0]) for r in each.responses] for each in groups]


@pytest.mark.parametrize("right", range(9))
def test_what_is_better_than_its_groups_mean_is_kept(right: int) -> None:
    """As in the authors' code, 4 of 8 are stored if 4 are right. With 1 to 7 right, all right ones are stored."""
    composer = SPEAR()
    compose(composer, 0, marked(0, 0, (1.0,) * right + (0.0,) * (8 - right)))
    assert composer.report()["replay/stored_responses"] == right % 8


def test_equal_rewards_are_not_kept_for_a_rounding_error() -> None:
    composer = SPEAR()
    compose(composer, 0, marked(0, 0, (0.1,) * 7))
    assert composer.report()["replay/stored_responses"] == 0


def test_the_baseline_leaves_the_current_groups_out() -> None:
    """As in the authors' code, A = 1 - 0.125, the stored mean. Two fresh groups at 1 count in it only the next time."""
    composer = SPEAR(start=1, warm_up=0)
    compose(composer, 0, marked(0, 0, (1.0,) + (0.0,) * 7))
    fresh = [marked(i, 1, (1.0,) * 8) for i in (1, 2)]
    (*_, replayed) = compose(composer, 1, *fresh)
    assert marks([replayed]) == [[0]]
    assert replayed.advantages is not None and replayed.advantages.tolist() == [0.875]
    assert composer.report()["replay/baseline"] == 1.0  # of 0.125, 1, 1


def test_rare_successes_are_kept_and_replayed_once_above_the_median() -> None:
    composer = SPEAR(start=3, warm_up=0, threshold=1.0)
    first = [marked(0, 0, HARD), marked(1, 0, EVEN), marked(2, 0, (0.0, 0.0, 0.0, 1.0))]
    assert compose(composer, 0, *first) == first
    assert composer.report()["replay/stored_responses"] == 2  # none of the even group
    second = [marked(3, 1, (0.0, 0.4, 0.0, 0.0)), marked(4, 1, (1.0, 1.0, 1.0, 1.0))]
    assert compose(composer, 1, *second) == second  # 2 kept, 3 needed; the 0.4 is the third
    third = [marked(5, 2, (0.0, 0.0, 0.0, 0.0)), marked(6, 2, EVEN)]
    found = compose(composer, 2, *third)
    # Group means: 0.25 0.5 0.25 | 0.1 1. Sorted: 0.1 0.25 0.25 0.5 1, median 0.25. The 0.4 has advantage 0.15.
    assert found[:2] == third
    assert ids(found[2:]) == [0, 2, 3] and marks(found[2:]) == [[0], [203], [301]]
    assert torch.cat([each.advantages for each in found[2:] if each.advantages is not None]).tolist() == pytest.approx(
        [0.75, 0.75, 0.15]
    )
    assert [(each.version, each.loss_weight) for each in found[2:]] == [(0, 1.0), (0, 1.0), (1, 1.0)]
    assert composer.report() == {
        "replay/replayed_responses": 3,
        "replay/stored_responses": 0,
        "replay/baseline": pytest.approx(0.25),  # including 0 and 0.5
    }
    assert len(compose(composer, 3, marked(7, 3, EVEN))) == 1  # replayed responses have left


def test_only_what_is_above_the_baseline_is_replayed() -> None:
    composer = SPEAR(start=2, warm_up=0)
    ordinary = [marked(i, 0, (0.6, 0.6, 0.6, 0.6)) for i in (2, 3, 4)]  # they make the median 0.6, and none is kept
    compose(composer, 0, marked(0, 0, HARD), marked(1, 0, (0.4, 0.0, 0.0, 0.0)), *ordinary)
    found = compose(composer, 1, marked(5, 1, (1.0, 0.5, 0.5, 0.4)))
    assert marks(found[1:]) == [[0]]
    advantages = found[1].advantages
    assert advantages is not None and advantages.tolist() == pytest.approx([0.4])
    assert composer.report()["replay/stored_responses"] == 1  # the new one; those below the baseline have left


def test_two_responses_of_a_group_stay_together() -> None:
    composer = SPEAR(start=2, warm_up=0)
    compose(composer, 0, marked(0, 0, EVEN), marked(1, 0, WRONG))
    found = compose(composer, 1, marked(2, 1, WRONG))
    assert marks(found[1:]) == [[0, 1]]
    assert [row.age for row in Minibatch(found, 1, 0).rows()] == [0, 0, 0, 0, 1, 1]
    assert [row.loss_weight for row in Minibatch(found, 1, 0).rows()] == [1.0] * 6


def test_the_oldest_are_too_old_or_fall_out() -> None:
    composer = SPEAR(start=2, warm_up=0, max_age=2)
    compose(composer, 0, marked(0, 0, HARD))
    compose(composer, 1, marked(1, 1, HARD))
    for version in (2, 3):  # At 2 both are there. At 3 the first is too old.
        state = composer.state_dict()
        found = compose(composer, version, marked(9, version, WRONG))
        assert marks(found[1:]) == ([[0], [100]] if version == 2 else [])
        composer.load_state_dict(state)
    full = SPEAR(capacity=2, start=2, warm_up=0)
    full._means.append(0.25)
    for version in range(3):
        full._keep([marked(version, version, HARD)])
    assert marks(compose(full, 3, marked(9, 3, EVEN))[1:]) == [[100], [200]]


def test_the_median_is_of_the_newest_groups() -> None:
    composer = SPEAR(start=2, warm_up=0, baseline_groups=2, threshold=1.0)
    compose(composer, 0, marked(0, 0, HARD), marked(1, 0, WRONG))
    compose(composer, 1, marked(2, 1, EVEN), marked(3, 1, (1.0, 1.0, 0.0, 1.0)))
    composer._keep([marked(4, 1, HARD)])
    (_, replayed, _) = compose(composer, 2, marked(5, 2, WRONG))
    assert replayed.advantages is not None
    assert replayed.advantages.tolist() == pytest.approx([1 - (0.5 + 0.75) / 2])


def test_the_coefficient_rises_as_a_cosine() -> None:
    composer = SPEAR(coefficient=0.8, warm_up=200, start=1)
    assert composer.loss_weight(0) == 0
    assert composer.loss_weight(50) == pytest.approx(0.4 * (1 - cos(pi / 4)))
    assert composer.loss_weight(100) == pytest.approx(0.4)
    assert composer.loss_weight(200) == composer.loss_weight(900) == 0.8
    assert SPEAR(warm_up=0).loss_weight(0) == 1
    compose(composer, 49, marked(0, 49, HARD))
    assert compose(composer, 50, marked(1, 50, EVEN))[1].loss_weight == pytest.approx(composer.loss_weight(50))


def test_spear_resumes_exactly(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"start": 5, "max_age": 4, "warm_up": 20, "baseline_groups": 7}
    straight, first = SPEAR(**settings), SPEAR(**settings)

    def fresh(version: int) -> list[Group]:
        return [marked(2 * version, version, HARD), marked(2 * version + 1, version, (0.0, 0.1 * version, 0.0, 0.0))]

    for version in range(2):
        for composer in (straight, first):
            compose(composer, version, *fresh(version))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = SPEAR(**settings)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    replayed = 0
    for version in range(2, 12):
        left, right = (compose(composer, version, *fresh(version)) for composer in (straight, resumed))
        assert marks(left) == marks(right)
        assert [each.loss_weight for each in left] == [each.loss_weight for each in right]
        worth = [[g.advantages.tolist() for g in each if g.advantages is not None] for each in (left, right)]
        assert worth[0] == worth[1]
        assert straight.report() == resumed.report()
        replayed += len(left) - 2
    assert replayed > 5
    smaller = SPEAR(capacity=5, start=5)
    smaller._keep([marked(i, 0, HARD) for i in range(5)])
    smallest = SPEAR(capacity=2, start=1)
    smallest.load_state_dict(smaller.state_dict())
    assert marks(smallest._kept) == [[300], [400]]


def test_spear_refuses() -> None:
    for settings, named in (
        ({"start": 0}, "start is 0"),
        ({"start": 9, "capacity": 8}, "start is 9"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"max_age": 0}, "max_age is 0"),
        ({"baseline_groups": 0}, "baseline_groups is 0"),
        ({"coefficient": 0.0}, "coefficient is 0.0"),
        ({"warm_up": -1}, "warm_up is -1"),
    ):
        with pytest.raises(SettingError, match=f"SPEAR.{named}"):
            SPEAR(**settings)  # type: ignore[arg-type]


def test_groups_of_one_response_train(policy: Path, tmp_path: Path) -> None:
    """Fixed advantages need no second response. They pass the trainer, its metrics and a minibatch's checkpoint."""
    composer = SPEAR(start=2, warm_up=0)
    objective = Objective(NoCorrection(), BehaveAligned(0.2, 0.28))
    advantage = GroupNormalized(normalize_by_std=False)
    run = fit(
        policy, tmp_path, composer=composer, objective=objective, iterations=4, lr=3e-4, model={"advantage": advantage}
    )
    replayed = [row.get("replay/groups", 0.0) for row in run.rows]
    assert replayed[0] == 0 and sum(replayed) > 0
    one = replace(marked(0, 0, (1.0,)), advantages=torch.tensor([0.3]), loss_weight=0.5)
    torch.save(Minibatch([one], 1, 0), tmp_path / "minibatch.pt")
    read = torch.load(tmp_path / "minibatch.pt", weights_only=True)
    assert run.module.advantages(read)[0].tolist() == pytest.approx(0.3)
    assert read.rows()[0].loss_weight == 0.5
