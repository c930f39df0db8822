"""Generalised advantage estimation and whitening, against numbers worked out by hand and a plain recursion."""

from __future__ import annotations

import pytest
import torch
from helpers.groups import group, response
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.objectives.generalized_advantage import GAE, gae, moments, whiten


def two_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Returns rewards, values and mask. The padding of the second row has meaningless numbers."""
    nan = float("nan")
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.5, -1.0, nan]])
    values = torch.tensor([[0.5, 0.25, 0.75], [1.0, 2.0, nan]])
    return rewards, values, torch.tensor([[True, True, True], [True, True, False]])


def test_by_hand() -> None:
    # gamma 1/2, lam 1/2, so gamma lam = 1/4. First row: deltas 0 + 0.125 - 0.5 = -0.375, 0 + 0.375 - 0.25 = 0.125,
    # 1 - 0.75 = 0.25; A_3 = 0.25, A_2 = 0.125 + 0.0625 = 0.1875, A_1 = -0.375 + 0.046875 = -0.328125.
    # Second row: deltas 0.5 + 1 - 1 = 0.5, -1 - 2 = -3; A_2 = -3, A_1 = 0.5 - 0.75 = -0.25.
    advantages, returns = gae(*two_rows(), gamma=0.5, lam=0.5)
    expected = torch.tensor([[-0.328125, 0.1875, 0.25], [-0.25, -3.0, 0.0]])
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-7)
    values = torch.tensor([[0.5, 0.25, 0.75], [1.0, 2.0, 0.0]])
    torch.testing.assert_close(returns, expected + values, rtol=0, atol=1e-7)


def test_gamma_and_lam_of_one_give_the_rewards_to_come_less_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 9, generator=generator).unbind()
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_come * mask, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(advantages, (to_come - values) * mask, rtol=1e-5, atol=1e-5)


def test_lam_of_zero_gives_the_deltas() -> None:
    rewards, values, mask = two_rows()
    advantages, _ = gae(rewards, values, mask, 0.5, 0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-0.375, 0.125, 0.25], [0.5, -3.0, 0.0]]))


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 13, 64, 100])
def test_against_the_recursion(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    rewards, values = torch.randn(2, 1, tokens, generator=generator, dtype=torch.float64).unbind()
    advantages, _ = gae(rewards, values, torch.ones(1, tokens), 0.99, 0.95)
    later, following = 0.0, 0.0
    for t in reversed(range(tokens)):
        later = float(rewards[0, t]) + 0.99 * following - float(values[0, t]) + 0.99 * 0.95 * later
        following = float(values[0, t])
        assert float(advantages[0, t]) == pytest.approx(later, abs=1e-5)


def uneven() -> Group:
    made = group(1, scores=(1.0, 0.0))
    made.responses[0] = response(tokens=(3, 4, 1), score=1.0)
    return made


def test_the_reward_stands_at_the_last_token() -> None:
    # gamma = 1/2, lam = 1 and values of 0: the reward 1 is discounted from the end.
    found = GAE(gamma=0.5).for_group(uneven(), "score", values=[torch.zeros(3), torch.zeros(2)])
    torch.testing.assert_close(found[0], torch.tensor([0.25, 0.5, 1.0]))
    torch.testing.assert_close(found[1], torch.zeros(2))


def test_a_group_gets_the_reward_less_the_value() -> None:
    values = [torch.tensor([0.5, 0.25, 0.75]), torch.tensor([0.5, -0.5])]
    found = GAE().for_group(uneven(), "score", values=values)
    torch.testing.assert_close(found[0], torch.tensor([0.5, 0.75, 0.25]))
    torch.testing.assert_close(found[1], torch.tensor([-0.5, 0.5]))
    for advantages, value, reward in zip(found, values, (1.0, 0.0), strict=True):
        torch.testing.assert_close(advantages + value, torch.full_like(value, reward))  # the returns


def test_values_are_asked_for() -> None:
    rule = GAE()
    assert rule.needs_values and rule.whitens and not GAE(whiten=False).whitens
    with pytest.raises(SettingError, match=r"set model\.critic"):
        rule.for_group(uneven(), "score")
    with pytest.raises(SettingError, match=r"set model\.critic"):
        rule(torch.ones(1, 2))


@pytest.mark.parametrize("settings", [{"gamma": 1.1}, {"lam": -0.1}, {"gamma": float("nan")}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"^GAE\.\w+ is .*must be in "):
        GAE(**settings)  # type: ignore[arg-type]


def test_whitening_by_hand() -> None:
    # Mean 2, squared deviations 1 + 1 + 0 + 4 + 4 = 10, unbiased variance 10 / 4 = 2.5.
    values = [torch.tensor([1.0, 3.0]), torch.tensor(2.0), torch.tensor([4.0, 0.0])]
    of_all = moments(values)
    assert of_all.tolist() == [5, 10, 30]
    found = whiten(values, of_all)
    assert [each.shape for each in found] == [each.shape for each in values]
    expected = (torch.tensor([1.0, 3.0, 2.0, 4.0, 0.0]) - 2) / 2.5**0.5
    torch.testing.assert_close(torch.cat([each.reshape(-1) for each in found]), expected, rtol=1e-6, atol=1e-7)


def test_ranks_share_their_moments() -> None:
    values = list(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7)
    of_all = moments(values[:2]) + moments(values[2:])
    whole = whiten(values, moments(values))
    parts = whiten(values[:2], of_all) + whiten(values[2:], of_all)
    torch.testing.assert_close(torch.stack(parts), torch.stack(whole))
    assert float(torch.stack(whole).mean()) == pytest.approx(0, abs=1e-6)
    assert float(torch.stack(whole).std()) == pytest.approx(1, abs=1e-6)


def test_too_few_or_equal_tokens_are_not_blown_up() -> None:
    alone = [torch.tensor([0.7])]
    assert torch.equal(whiten(alone, moments(alone))[0], alone[0])
    assert whiten([], moments([])) == []
    equal = [torch.full((7,), 0.1)]
    assert whiten(equal, moments(equal))[0].abs().max() < 1e-4
