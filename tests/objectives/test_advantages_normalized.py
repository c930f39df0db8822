"""GRPO's and Dr.GRPO's advantage against numbers worked out by hand (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.objectives import (
    close,
)

from popo_lightning.core.errors import SettingError
from popo_lightning.objectives.advantages import GroupNormalized, group_normalized


def test_group_normalized_by_hand() -> None:
    # Mean 1/4; squared deviations 9/16 + 3/16 = 3/4; unbiased variance 3/4 / 3 = 1/4, std 1/2 (biased: 0.433).
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 4.0]])
    # Second row: mean 2, squared deviations 16, variance 16/3.
    second = 2 / math.sqrt(16 / 3)
    close(
        group_normalized(rewards), [[1.5, -0.5, -0.5, -0.5], [-second, second, -second, second]], rtol=1e-5, atol=1e-5
    )
    # A large eps shows its place: 0.75 / (0.5 + 0.5).
    close(group_normalized(rewards[:1], eps=0.5), [[0.75, -0.25, -0.25, -0.25]])
    close(GroupNormalized(normalize_by_std=False)(rewards), [[0.75, -0.25, -0.25, -0.25], [-2.0, 2.0, -2.0, 2.0]])
    close(GroupNormalized()(rewards), group_normalized(rewards))


def test_equal_rewards_give_exactly_zero() -> None:
    # In float32 seven times 0.1 has a std of about 7e-9 instead of 0. A spread of 1e-6 counts as none, 1e-3 as some.
    for size in (2, 7, 8, 24):
        rewards = torch.full((1, size), 0.1)
        rewards[0, 0] += 2e-7
        for normalize in (True, False):
            assert torch.equal(group_normalized(rewards, normalize_by_std=normalize), torch.zeros(1, size))
    assert group_normalized(torch.tensor([[0.1, 0.101]])).abs().min() > 0.5


def test_group_of_one_is_refused() -> None:
    with pytest.raises(SettingError, match="at least 2"):
        group_normalized(torch.ones(3, 1))
