"""The target copy: how it moves, what returns it gives, and when it decides whether a critic converges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.groups import group
from helpers.tiny_models import Run, fit, metrics
from torch import Tensor, nn

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.critic import Critic, check_critic
from popo_lightning.model.critic_heads import CategoricalHead
from popo_lightning.model.critic_target import TargetCopy, TargetCritic
from popo_lightning.objectives.generalized_advantage import GAE, gae
from popo_lightning.policy import PolicyModule
from popo_lightning.training.minibatch_targets import minibatch_targets


def linear(*weights: float) -> nn.Linear:
    made = nn.Linear(len(weights), 1, bias=False, dtype=torch.float64)
    made.weight.data = torch.tensor([weights], dtype=torch.float64)
    return made


def copier(every: int) -> TargetCritic:
    """Makes a target with polyak 1. `every` is set afterwards, because 1 is refused: the copy would be the critic."""
    made = TargetCritic(every=2, polyak=1.0)
    made.every = every
    return made


def of(copied: TargetCopy) -> list[float]:
    found: list[float] = copied.model.weight.data[0].tolist()
    return found


# -- how it moves ----------------------------------------------------------------------------------------------


def test_it_moves_after_every_few_steps_and_so_far() -> None:
    live, target = linear(0.0), TargetCritic(every=2, polyak=0.25)
    copied = TargetCopy(live, target)
    live.weight.data += 8
    target.follow(live, copied, 1)
    assert of(copied) == [0.0]
    target.follow(live, copied, 2)
    assert of(copied) == [2.0]
    target.follow(live, copied, 4)
    assert of(copied) == [3.5]
    assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_polyak_1_copies_every_bit() -> None:
    live, target = linear(0.1, 1e-30, 3.0), copier(1)
    copied = TargetCopy(live, target)
    live.weight.data = torch.tensor([[0.3, -1e20, 1 / 3]], dtype=torch.float64)
    target.follow(live, copied, 1)
    assert of(copied) == live.weight.data[0].tolist()


def test_momentum_makes_a_part_of_the_last_move_again() -> None:
    # w' 0, w 8, polyak 1/2, momentum 1/4: v 4, w' 4; v 1 + 2 = 3, w' 7; v 0.75 + 0.5 = 1.25, w' 8.25.
    live, target = linear(0.0), TargetCritic(polyak=0.5, momentum=0.25)
    copied = TargetCopy(live, target)
    live.weight.data += 8
    found = []
    for step in (1, 2, 3):
        target.follow(live, copied, step)
        found += of(copied)
    assert found == [4.0, 7.0, 8.25]


def test_the_anchor_pulls_to_the_copy() -> None:
    live, target = linear(1.0, 2.0), TargetCritic(anchor=0.5)
    copied = TargetCopy(live, target)
    live.weight.data += torch.tensor([[2.0, -4.0]])
    target.pull(live, copied)
    assert live.weight.grad is None
    live.weight.grad = torch.ones_like(live.weight)
    target.pull(live, copied)
    assert live.weight.grad.tolist() == [[2.0, -1.0]]
    TargetCritic().pull(live, copied)
    assert live.weight.grad.tolist() == [[2.0, -1.0]]


def test_what_is_frozen_is_shared() -> None:
    live = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    copied = TargetCopy(live, TargetCritic(momentum=0.5))
    assert copied.model[0].weight is live[0].weight and copied.model[1].weight is not live[1].weight
    assert copied.saved == {f"{part}.1.{name}" for part in ("model", "speed") for name in ("weight", "bias")}
    assert copied.speed is not None and not copied.speed[1].weight.any() and copied.speed[0].weight.any()


# -- what it is for --------------------------------------------------------------------------------------------


def evaluated(features: Tensor, ahead: Tensor, rewards: Tensor, start: Tensor, settings: dict[str, Any]) -> list[float]:
    """Returns errors |w - 0| by step of expected TD(0), with the target's own rule, until it diverges.

    Args:
        features: (S, d) features of the states.
        ahead: (S, d) expected features of the next state, times the discount.
        rewards: (S,) rewards.
        start: (d,) weights at the start.
        settings: steps, lr, and the settings of TargetCritic.
    """
    settings = dict(settings)
    steps, lr = settings.pop("steps"), settings.pop("lr")
    given = settings.pop("every", 1)
    live, target = linear(*start.tolist()), TargetCritic(every=given, **settings) if settings else copier(given)
    copied = TargetCopy(live, target)
    weight, behind = live.weight.data[0], copied.model.weight.data[0]
    found = []
    ours, theirs, fixed = features.T @ features / len(rewards), features.T @ ahead / len(rewards), None
    fixed = features.T @ rewards / len(rewards)
    for step in range(1, steps + 1):
        gradient = ours @ weight - theirs @ behind - fixed
        live.weight.grad = gradient[None]
        target.pull(live, copied)
        weight -= lr * live.weight.grad[0]
        target.follow(live, copied, step)
        found.append(float((features @ weight).abs().max()))
        if found[-1] > 1e4:
            break
    return found


def baird() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seven states lead to the seventh and have value 0. All are updated equally often, unlike under the policy."""
    features = torch.zeros(7, 8, dtype=torch.float64)
    features[:6, :6] = 2 * torch.eye(6)
    features[:6, 7] = 1
    features[6, 6], features[6, 7] = 1, 2
    start = torch.tensor([1.0, 1, 1, 1, 1, 1, 10, 1], dtype=torch.float64)
    return features, 0.99 * features[6].expand(7, 8), torch.zeros(7, dtype=torch.float64), start


@pytest.mark.parametrize("every", [1, 5, 10])
def test_bairds_star_diverges_with_a_target_that_follows_closely(every: int) -> None:
    """[N] Uniform updates with step 0.01 and gamma 0.99."""
    found = evaluated(*baird(), settings={"every": every, "lr": 0.01, "steps": 20000})
    assert found[-1] > 1e4


@pytest.mark.parametrize("every", [100, 500, 1000])
def test_bairds_star_converges_with_one_that_waits(every: int) -> None:
    """[N] The errors fall."""
    found = evaluated(*baird(), settings={"every": every, "lr": 0.01, "steps": 12000})
    assert found[-1] < 0.95 * found[5999] < 0.95 * found[1999]


def test_bairds_star_has_the_error_of_a_simulation_that_draws_its_states() -> None:
    """[N] It found 0.008 after 50,000 steps with k 100. Expected updates have no noise."""
    found = evaluated(*baird(), settings={"every": 100, "lr": 0.01, "steps": 50000})
    assert 0.003 < found[-1] < 0.01


def chain() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three states in a row that ends, two features, and rewards. Updates are as frequent as the policy's visits."""
    features = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    ahead = 0.9 * torch.cat((features[1:], torch.zeros(1, 2, dtype=torch.float64)))
    return features, ahead, torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings", [{"every": 1}, {"every": 10}, {"every": 100}, {"anchor": 0.2}, {"polyak": 0.1, "momentum": 0.5}]
)
def test_on_policy_the_fixed_point_is_the_same(settings: dict[str, Any]) -> None:
    """[N] This holds for every k, and with anchor and momentum, which vanish at the fixed point."""
    features, ahead, rewards, start = chain()
    solved = torch.linalg.solve(features.T @ (features - ahead), features.T @ rewards)
    found = evaluated(features, ahead, rewards, start, {"lr": 0.5, "steps": 3000} | settings)
    assert found[-1] == pytest.approx(float((features @ solved).abs().max()), abs=1e-6)


# -- returns ---------------------------------------------------------------------------------------------------


def two_values(lam: float, head: Any = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    critic = Critic(target=TargetCritic(every=2))
    estimates = {
        "values": [torch.tensor([0.5, 0.25]), torch.tensor([0.1, 0.2])],
        "target_values": [torch.tensor([0.3, 0.8]), torch.tensor([0.4, 0.6])],
    }
    minibatch = Minibatch([group(0, scores=(0.0, 1.0))], 0, 0)
    found = minibatch_targets(minibatch, GAE(lam=lam), "score", critic, estimates)
    return found.advantages, found.of_critic["returns"], found.of_critic["values"]


def test_returns_are_the_copys_and_the_baseline_is_the_critics() -> None:
    # lam 1/2, rewards at the end. First row, R 0, V' 0.3 0.8: deltas 0.5, -0.8; A' 0.5 - 0.4 = 0.1, -0.8; returns 0.4,
    # 0; minus V 0.5 0.25: -0.1, -0.25. Second row, R 1, V' 0.4 0.6: deltas 0.2, 0.4; A' 0.4, 0.4; returns 0.8, 1; minus
    # 0.1 0.2: 0.7, 0.8.
    advantages, returns, values = two_values(0.5)
    torch.testing.assert_close(torch.stack(returns), torch.tensor([[0.4, 0.0], [0.8, 1.0]]))
    torch.testing.assert_close(torch.stack(advantages), torch.tensor([[-0.1, -0.25], [0.7, 0.8]]))
    torch.testing.assert_close(torch.stack(values), torch.tensor([[0.5, 0.25], [0.1, 0.2]]))
    rewards, mask = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.ones(2, 2)
    _, expected = gae(rewards, torch.tensor([[0.3, 0.8], [0.4, 0.6]]), mask, 1.0, 0.5)
    torch.testing.assert_close(torch.stack(returns), expected)


def test_at_lam_1_it_would_change_nothing_and_is_refused() -> None:
    _, returns, _ = two_values(1.0)
    torch.testing.assert_close(torch.stack(returns), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    with pytest.raises(SettingError, match=r"a target critic has no effect at lam 1.*set model\.advantage\.lam below"):
        check_critic(Critic(target=TargetCritic()), GAE())
    check_critic(Critic(target=TargetCritic()), GAE(lam=0.95))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TargetCritic(every=0), r"TargetCritic\.every is 0"),
        (lambda: TargetCritic(polyak=0.0), r"TargetCritic\.polyak is 0"),
        (lambda: TargetCritic(polyak=1.5), r"TargetCritic\.polyak is 1\.5"),
        (lambda: TargetCritic(anchor=-1.0), r"TargetCritic\.anchor is -1"),
        (lambda: TargetCritic(momentum=1.0), r"TargetCritic\.momentum is 1"),
        (lambda: TargetCritic(polyak=1.0), r"every 1, polyak 1 and momentum 0.*set polyak below 1"),
        (lambda: TargetCritic(polyak=1.0, anchor=0.5), r"every 1, polyak 1 and momentum 0"),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        make()


@pytest.mark.parametrize("settings", [{}, {"polyak": 1.0, "momentum": 0.5}])
def test_bfloat16_weights_would_lose_small_steps(settings: dict[str, Any]) -> None:
    """A step of 5% of one unit in the last place is rounded to nothing."""
    live = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    live.weight.data.fill_(1.0)
    target = TargetCritic()
    copied = TargetCopy(live, target)
    live.weight.data += 2**-7
    for step in range(1, 100):
        target.follow(live, copied, step)
    assert float(copied.model.weight) == 1
    critic, advantage = Critic(target=TargetCritic(**settings)), GAE(lam=0.95)
    with pytest.raises(SettingError, match=r"model\.dtype is bfloat16, which rounds away"):
        check_critic(critic, advantage, "bfloat16")
    with pytest.raises(SettingError, match=r"model\.dtype is bfloat16, which rounds away"):
        PolicyModule(path="none", advantage=advantage, critic=critic, dtype="bfloat16")
    check_critic(critic, advantage, "bfloat16", adapters=True)
    check_critic(Critic(target=TargetCritic(every=100, polyak=1.0)), advantage, "bfloat16")


# -- in a run --------------------------------------------------------------------------------------------------


def run(policy: Path, folder: Path, target: TargetCritic | None, **critic: Any) -> Run:
    model = {"advantage": GAE(lam=0.9), "critic": Critic(lr=1e-2, target=target, **critic)}
    return fit(policy, folder, model=model, iterations=3, ppo_epochs=2)


def test_a_target_that_copies_every_step_changes_no_bit(policy: Path, tmp_path: Path) -> None:
    """[N] With every 1 and polyak 1, the copy is the critic at the start of each iteration."""
    plain, copied = run(policy, tmp_path / "plain", None), run(policy, tmp_path / "copied", copier(1))
    assert metrics(plain.folder) == metrics(copied.folder)
    weights = plain.weights
    assert {name for name in copied.weights if name not in weights} and all(
        torch.equal(weight, copied.weights[name]) for name, weight in weights.items()
    )


def test_a_target_that_lags_changes_the_course(policy: Path, tmp_path: Path) -> None:
    plain = run(policy, tmp_path / "plain", None, value_clip=None, head=CategoricalHead(), heads=2)
    settings: dict[str, Any] = {"value_clip": None, "head": CategoricalHead(), "heads": 2}
    target = TargetCritic(every=3, polyak=0.5, anchor=0.1, momentum=0.1)
    lagging = run(policy, tmp_path / "lagging", target, **settings)
    assert metrics(plain.folder)[-1]["train/value_loss"] != metrics(lagging.folder)[-1]["train/value_loss"]
    copied = lagging.module.value_target
    assert copied is not None and copied.speed is not None
    live = lagging.module.value_model.head.weight
    assert not torch.equal(live, copied.model.head.weight) and copied.speed.head.weight.any()
    second = lagging.trainer.optimizers[0].param_groups[1]["params"]
    assert {id(each) for each in second} == {id(each) for each in lagging.module.value_model.parameters()}
