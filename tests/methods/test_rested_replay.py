"""The queue of rested groups, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from helpers.groups import group, ids, iteration
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.methods.popo_rested import RestedReplay

DULL = (1.0, 1.0)
FAR = {2: 3.0}  # weight of one of the four tokens of group 2: ESS = (3 + 3)^2 / (4 (3 + 9)) = 0.75


def present(groups: Sequence[Group]) -> list[list[Tensor]]:
    return [
        [torch.tensor([-0.5 + math.log(FAR.get(g.id, 1.0)), -0.5]), torch.tensor([-0.5, -0.5])]
        for g in groups  # behave is -0.5 at every token
    ]


def composed(composer: RestedReplay, version: int, effective: Sequence[int], dull: int) -> list[int]:
    fresh = [group(i, version) for i in effective]
    fresh += [group(1000 * version + i, version, scores=DULL) for i in range(dull)]
    return ids(composer.compose(iteration(version, fresh, present_logprobs=present)))


def queue(composer: RestedReplay) -> list[int]:
    return ids(composer.state_dict()["_queue"])


def test_the_longest_rested_come_first_and_go_to_the_back() -> None:
    composer = RestedReplay(rest_interval=5, min_ess=0.0)
    assert composed(composer, 0, [1, 2, 3], 0) == [1, 2, 3]
    assert composed(composer, 1, [4], 2) == [4, 1, 2]
    assert queue(composer) == [3, 4, 1, 2]
    assert composed(composer, 2, [5], 2) == [5, 3, 4]
    assert queue(composer) == [1, 2, 5, 3, 4]


def test_what_fails_the_test_leaves_for_good() -> None:
    composer = RestedReplay(rest_interval=5, min_ess=0.76)
    composed(composer, 0, [1, 2, 3], 0)
    assert composed(composer, 1, [4], 2) == [4, 1, 3]
    assert queue(composer) == [4, 1, 3]
    kept = RestedReplay(rest_interval=5, min_ess=0.74)
    composed(kept, 0, [1, 2, 3], 0)
    assert composed(kept, 1, [4], 2) == [4, 1, 2]


def test_no_more_groups_are_tested_than_an_iteration_samples() -> None:
    composer = RestedReplay(rest_interval=9, min_ess=0.76)
    composed(composer, 0, [2, 3, 4], 0)
    composed(composer, 1, [5, 6, 7], 0)  # no free place, so no test, which would find 2
    assert queue(composer) == [2, 3, 4, 5, 6, 7]
    assert composed(composer, 2, [8], 2) == [8, 3, 4]  # 2, 3 and 4 were tested
    assert composed(composer, 3, [], 1) == [5]
    assert queue(composer) == [6, 7, 8, 3, 4, 5]


def test_the_oldest_version_makes_room_even_if_it_was_trained_on_last() -> None:
    composer = RestedReplay(rest_interval=1, min_ess=0.0)
    composed(composer, 0, [1, 2, 3], 0)
    composed(composer, 1, [4, 5], 1)  # 1 was trained on again. Of 1, 2 and 3, the two nearest the front leave.
    assert queue(composer) == [4, 5, 1]


def test_a_problem_that_the_batch_has_waits_at_the_front() -> None:
    composer = RestedReplay(rest_interval=5, min_ess=0.0)
    stored = [group(1, 0, problem="a"), group(2, 0, problem="b"), group(3, 0, problem="c")]
    composer.compose(iteration(0, stored, present_logprobs=present))
    fresh = [group(4, 1, problem="a"), group(5, 1, scores=DULL), group(6, 1, problem="d")]
    assert ids(composer.compose(iteration(1, fresh, present_logprobs=present))) == [4, 6, 2]
    assert queue(composer) == [1, 3, 4, 6, 2]


def test_the_queue_survives_a_checkpoint() -> None:
    composer, other = RestedReplay(rest_interval=2), RestedReplay(rest_interval=2)
    composed(composer, 0, [1, 3, 4], 0)
    composed(composer, 1, [5], 2)
    other.load_state_dict(composer.state_dict())
    assert composed(composer, 2, [6], 2) == composed(other, 2, [6], 2)
    assert queue(composer) == queue(other)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(SettingError, match="rest_interval is 0"):
        RestedReplay(rest_interval=0)
    with pytest.raises(SettingError, match=r"min_ess is 1\.1"):
        RestedReplay(min_ess=1.1)
