"""What heads learn: distributions with known means and standard deviations, and the minimum of twin heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.groups import group, response
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.critic import Critic, check_critic
from popo_lightning.model.critic_heads import (
    CategoricalHead,
    GaussianHead,
    ValueHead,
    gaussian_losses,
    projected,
)
from popo_lightning.objectives.generalized_advantage import GAE, moments, whiten
from popo_lightning.training.minibatch_targets import minibatch_targets


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- scalar ----------------------------------------------------------------------------------------------------


def test_one_scalar_heads_output_is_the_value() -> None:
    values = random(4, 5)
    assert torch.equal(Critic().estimates(values)["values"], values)


# -- twin heads ------------------------------------------------------------------------------------------------


def test_the_least_of_twin_heads_counts_and_each_learns() -> None:
    # The values of one row are 2 and 1, then -1 and 3. The loss is the heads' mean of half the squared errors, over 2
    # tokens.
    # The returns are 1 and 1: ((1 + 4) + (0 + 4)) / 2 / 2 heads / 2 tokens = 9 / 8.
    out = torch.tensor([[[2.0, 1.0], [-1.0, 3.0]]], requires_grad=True)
    critic, mask, ones = Critic(heads=2, value_clip=None), torch.ones(1, 2).bool(), torch.ones(1, 2)
    assert critic.estimates(out.detach())["values"].tolist() == [[1.0, -1.0]]
    loss = critic.loss(out, ones, ones, mask, 2.0)
    assert float(loss.detach()) == pytest.approx(9 / 8)
    loss.backward()
    assert out.grad is not None
    assert out.grad.tolist() == [[[0.25, 0.0], [-0.5, 0.5]]]


def test_a_clip_around_the_least_of_twin_heads_would_stop_the_other() -> None:
    """The values are 0 and 2, and 0 is recorded. On its way up to 3 the second head would get no gradient."""
    old, returns, mask = torch.zeros(1, 1), torch.full((1, 1), 3.0), torch.ones(1, 1).bool()
    found = []
    for clip in (0.5, None):
        out = torch.tensor([[[0.0, 2.0]]], requires_grad=True)
        critic = Critic(heads=2, value_clip=None)
        critic.value_clip = clip
        critic.loss(out, old, returns, mask, 1.0).backward()
        assert out.grad is not None
        found.append(out.grad[0, 0].tolist())
    assert found == [[-1.5, 0.0], [-1.5, -0.5]]


def test_twin_heads_differ_from_the_start_and_the_first_is_what_it_is_alone() -> None:
    weights = Critic(heads=2, value_clip=None).head_weights(400)
    assert weights["head.weight"].shape == (2, 400) and not weights["head.weight"][0].any()
    assert float(weights["head.weight"][1].norm()) == pytest.approx(0.1, rel=0.2)
    assert torch.equal(weights["head.weight"], Critic(heads=2, value_clip=None).head_weights(400)["head.weight"])
    before = torch.random.get_rng_state()
    Critic(heads=3, value_clip=None).head_weights(8)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_standard_deviation_is_that_of_the_least_head() -> None:
    critic = Critic(head=GaussianHead(), heads=2, value_clip=None)
    found = critic.estimates(torch.tensor([[0.5, 0.0, 0.25, 1.0], [0.1, 2.0, 0.2, 3.0]]))
    assert found["values"].tolist() == pytest.approx([0.25, 0.1])
    assert found["value_std"].tolist() == pytest.approx([math.log1p(math.e), math.log1p(math.e**2)])


# -- gaussian --------------------------------------------------------------------------------------------------


def expected_gradients(p: float, mean: float, std: float, clip: float | None) -> tuple[float, float]:
    """Returns gradients in mean and std for returns of 1 with probability p. The running std equals the head's."""
    given = [torch.tensor([each, each], dtype=torch.float64, requires_grad=True) for each in (mean, std)]
    chances, returns = torch.tensor([[p, 1 - p], [1.0, 0.0]], dtype=torch.float64)
    losses = gaussian_losses(given[0], given[1], returns, torch.tensor(std, dtype=torch.float64), clip)
    (chances * losses).sum().backward()
    found = [float(each.grad.sum()) for each in given if each.grad is not None]
    return found[0], found[1]


def check_fixed_point(p: float, mean: float, std: float, clip: float | None) -> None:
    assert expected_gradients(p, mean, std, clip) == pytest.approx((0, 0), abs=1e-12)
    assert expected_gradients(p, mean + 0.01, std, clip)[0] > 0 > expected_gradients(p, mean - 0.01, std, clip)[0]
    assert expected_gradients(p, mean, std + 0.01, clip)[1] > 0 > expected_gradients(p, mean, std - 0.01, clip)[1]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_returns_of_0_and_1_give_their_mean_and_standard_deviation(p: float) -> None:
    """[N] V = p and sigma = sqrt(p (1 - p)) without the clip."""
    check_fixed_point(p, p, math.sqrt(p * (1 - p)), None)


def test_the_clip_makes_the_standard_deviation_of_rare_returns_too_small() -> None:
    """With b = s the clip at 3 b solves s^2 = (1 - p) p^2 + 9 p s^2. So s^2 = (1 - p) p^2 / (1 - 9 p) below p = 0.1."""
    p = 0.05
    std = math.sqrt((1 - p) * p**2 / (1 - 9 * p))
    check_fixed_point(p, p, std, 3.0)
    assert std < 0.4 * math.sqrt(p * (1 - p))
    check_fixed_point(0.5, 0.5, 0.5, 3.0)  # no return is that far away


def test_sampled_returns_give_what_a_simulation_of_the_source_gave() -> None:
    """[N] For p 0.1, 0.5, 0.9, V is 0.101, 0.517, 0.910, and sigma 0.27, 0.50, 0.26, against 0.30, 0.50, 0.30."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.5, 0.9])
    weights = torch.zeros(3, 2, requires_grad=True)
    head, running = GaussianHead(3.0), torch.full((3,), math.log(2))
    for step in range(600):
        returns = (torch.rand(8, 3, generator=generator) < p).float()
        running.lerp_(head.std(weights.detach()), 0.05)
        weights.grad = None
        head.losses(weights.expand(8, 3, 2), returns, running).mean(dim=0).sum().backward()
        assert weights.grad is not None
        weights.data -= 0.3 * 0.1 ** (step / 600) * weights.grad
    assert (head.value(weights.detach()) - p).abs().max() < 0.06
    std = head.std(weights.detach())
    assert abs(float(std[1]) - 0.5) < 0.05 and 0.15 < float(std[0]) < 0.33 and 0.15 < float(std[2]) < 0.33


def test_the_losses_by_hand() -> None:
    # mean 1/2, std 1/2, return 1, b 1/10, clip 3: e = 0.3. omega = 0.01 / 0.35 = 0.02857, but at least 0.1.
    # The gradients are omega (mean - R) = -0.05 and omega (0.25 - 0.09) / 0.6 = 0.02667.
    mean, std = (torch.tensor(0.5, requires_grad=True) for _ in range(2))
    gaussian_losses(mean, std, torch.tensor(1.0), torch.tensor(0.1), 3.0).backward()
    assert mean.grad is not None and std.grad is not None
    assert float(mean.grad) == pytest.approx(-0.05) and float(std.grad) == pytest.approx(0.1 * 0.16 / 0.6)
    # Without the clip e = 0.5 = std, so std has no gradient. b 1: omega = 1 / 0.35. b 10: at most 10.
    for b, scale in ((1.0, 1 / 0.35), (10.0, 10.0)):
        mean.grad = std.grad = None
        gaussian_losses(mean, std, torch.tensor(1.0), torch.tensor(b), None).backward()
        assert mean.grad is not None and std.grad is not None
        assert float(mean.grad) == pytest.approx(-0.5 * scale) and float(std.grad) == pytest.approx(0)


def scaled(scale: float, critic: Critic, std: float = 0.25) -> list[Tensor]:
    """Returns advantages of a group whose rewards, values and standard deviations are all scaled."""
    one = group(0, scores=(0.0, scale))
    minibatch = Minibatch([one], 0, 0)
    estimates = {
        "values": [torch.full((2,), 0.4 * scale)] * 2,
        "value_std": [torch.tensor([std, 0.001]) * scale] * 2,
    }
    return minibatch_targets(minibatch, GAE(whiten=False), "score", critic, estimates).advantages


def test_advantages_in_standard_deviations_do_not_depend_on_the_rewards_unit() -> None:
    """[N] Rewards times 10 do not change the policy's step, since its advantages are the same."""
    critic = Critic(head=GaussianHead(sigma_floor=1e-4), value_clip=None)
    for once, ten in zip(scaled(1.0, critic), scaled(10.0, critic), strict=True):
        torch.testing.assert_close(once, ten)
    plain = scaled(10.0, Critic(head=GaussianHead(), value_clip=None))
    torch.testing.assert_close(plain[1], torch.tensor([6.0, 6.0]))
    floor = scaled(1.0, Critic(head=GaussianHead(sigma_floor=0.05), value_clip=None))
    torch.testing.assert_close(floor[1], torch.tensor([0.6 / 0.25, 0.6 / 0.05]))


def test_gradients_of_the_loss_have_the_unit_of_the_rewards() -> None:
    """This is why omega exists: if the variance far exceeds the bias, rewards times ten give gradients times ten."""
    found = []
    for scale in (100.0, 1000.0):
        mean, std = (torch.tensor(each * scale, requires_grad=True) for each in (0.4, 0.3))
        gaussian_losses(mean, std, torch.tensor(scale), torch.tensor(0.5 * scale), 3.0).backward()
        found.append([float(each.grad) / scale for each in (mean, std) if each.grad is not None])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_a_known_standard_deviation_gives_advantages_of_variance_1() -> None:
    """[N] By counting: of ten responses with p = 0.1, one is right."""
    p, critic = 0.1, Critic(head=GaussianHead(sigma_floor=0.05), value_clip=None)
    minibatch = Minibatch([group(0, scores=[1.0] + [0.0] * 9)], 0, 0)
    estimates = {"values": [torch.full((2,), p)] * 10, "value_std": [torch.full((2,), math.sqrt(p * (1 - p)))] * 10}
    found = torch.cat(minibatch_targets(minibatch, GAE(whiten=False), "score", critic, estimates).advantages)
    assert float((found**2).mean()) == pytest.approx(1, rel=1e-5) and float(found.mean()) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(torch.stack(whiten([found], moments([found])))[0], found, rtol=0.06, atol=1e-5)


# -- categorical -----------------------------------------------------------------------------------------------


def test_a_projection_keeps_mass_and_mean() -> None:
    """[N] It keeps the mean of r + gamma z, up to rounding, if all of it lies between the atoms."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(20, 11, generator=generator, dtype=torch.float64)
    chances = weights / weights.sum(dim=-1, keepdim=True)
    returns = 0.05 + 0.9 * torch.rand(20, 11, generator=generator, dtype=torch.float64)
    found = projected(returns, chances, 0.0, 1.0, 51)
    assert found.shape == (20, 51) and bool((found >= 0).all())
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(20, dtype=torch.float64))
    mean = found @ torch.linspace(0, 1, 51, dtype=torch.float64)
    torch.testing.assert_close(mean, (chances * returns).sum(dim=-1))


def test_a_return_gives_its_probability_to_its_neighbours() -> None:
    """[N] A deterministic return has two neighboring atoms. A return at an atom, or beyond all, has one."""
    found = projected(torch.tensor([[0.3], [0.5], [-1.0], [2.0]]), torch.ones(4, 1), 0.0, 1.0, 5)
    expected = [[0, 0.8, 0.2, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_a_categorical_head_learns_the_distribution() -> None:
    """Returns are 1 with probability 0.3, else 0. The cross-entropy is lowest at that distribution itself."""
    head = CategoricalHead(atoms=5)
    logits = torch.zeros(5, requires_grad=True)
    assert float(head.value(logits.detach())) == pytest.approx(0.5)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        losses = head.losses(logits.expand(2, 5), torch.tensor([1.0, 0.0]), None)
        (torch.tensor([0.3, 0.7]) * losses).sum().backward()
        optimizer.step()
    assert float(head.value(logits.detach())) == pytest.approx(0.3, abs=0.01)
    chances = logits.detach().softmax(-1)
    assert chances[[0, -1]].tolist() == pytest.approx([0.7, 0.3], abs=0.01)


@pytest.mark.parametrize("head", [CategoricalHead(), GaussianHead()])
def test_padding_sends_nothing_back(head: ValueHead) -> None:
    critic = Critic(head=head, value_clip=None, heads=2)
    out = random(2, 3, 2 * head.width)
    out[1, 1:] = math.nan
    out.requires_grad_(True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    returns = torch.where(mask, 0.5, math.nan)
    critic.loss(out, returns, returns, mask, 4.0, torch.ones(2)).backward()
    assert out.grad is not None and bool(out.grad[mask].ne(0).any(dim=-1).all())
    assert not out.grad[~mask].any()


def test_returns_beside_the_atoms_are_refused() -> None:
    one = group(0)
    one.responses[0] = response(score=-0.5)
    critic, values = Critic(head=CategoricalHead(), value_clip=None), {"values": [torch.zeros(2)] * 2}
    with pytest.raises(SettingError, match=r"from 0 to 1, but returns are from -0\.5 to 1; set its low and high"):
        minibatch_targets(Minibatch([one], 0, 0), GAE(), "score", critic, values)
    wide = Critic(head=CategoricalHead(low=-1.0), value_clip=None)
    minibatch_targets(Minibatch([one], 0, 0), GAE(), "score", wide, values)
    minibatch_targets(Minibatch([group(0)], 0, 0), GAE(), "score", critic, values)


# -- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GaussianHead(clip_sigmas=0.0), "GaussianHead.clip_sigmas is 0.0"),
        (lambda: GaussianHead(sigma_floor=0.0), "GaussianHead.sigma_floor is 0.0"),
        (lambda: GaussianHead(running_rate=2.0), "GaussianHead.running_rate is 2.0"),
        (lambda: CategoricalHead(atoms=1), "CategoricalHead.atoms is 1"),
        (lambda: CategoricalHead(low=1.0), "CategoricalHead.high is 1.0"),
        (lambda: Critic(heads=0), "Critic.heads is 0"),
        (lambda: Critic(heads=2), r"value_clip is 0\.5, but model\.critic\.heads is 2.*set value_clip to null"),
        (lambda: Critic(head=CategoricalHead()), r"value_clip is 0\.5, but .*CategoricalHead.*set value_clip to null"),
        (lambda: Critic(head=GaussianHead()), r"value_clip is 0\.5, but .*GaussianHead.*set value_clip to null"),
        (
            lambda: check_critic(Critic(value_clip=None, head=GaussianHead(sigma_floor=0.05)), GAE()),
            r"sigma_floor is 0\.05 and model\.advantage\.whiten is true.*set whiten to false",
        ),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        make()
    check_critic(Critic(value_clip=None, head=GaussianHead(sigma_floor=0.05)), GAE(whiten=False))


def test_no_head_sees_the_running_mean_of_another() -> None:
    """Each head's clip uses its own running standard deviation."""
    out = torch.zeros(1, 1, 4, requires_grad=True)
    critic = Critic(head=GaussianHead(), heads=2, value_clip=None)
    ones, mask = torch.ones(1, 1), torch.ones(1, 1).bool()
    critic.loss(out, ones, ones, mask, 1.0, torch.tensor([0.1, 1.0])).backward()
    assert out.grad is not None and out.grad[0, 0, 1] > 0 > out.grad[0, 0, 3]
