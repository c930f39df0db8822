"""A temperature for each response: the weight removes the bias, and nearly uniform groups get a spread.

Policies are tabular, so the exact gradient is known. Temperatures are drawn as engines draw them.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from popo_lightning.engines.base import Sampling, prompt_seeds
from popo_lightning.objectives.advantages import LeaveOneOut
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.weights import BehaveWeight, NoCorrection, SequenceIS, TruncatedIS

GROUPS, SIZE = 25_000, 4  # 100,000 responses
SPREAD = Sampling(2, 1.0, temperature_spread=0.5)


@cache
def temperatures(groups: int, size: int, sampling: Sampling = SPREAD) -> Tensor:
    """Returns (groups, size) temperatures as engines draw them."""
    seeds = prompt_seeds(1, groups)
    return torch.tensor([[sampling.temperature_of(seed + i) for i in range(size)] for seed in seeds]).double()


def pushes(logp: Tensor, behave: Tensor, rewards: Tensor, weight: BehaveWeight) -> Tensor:
    """Returns (R, T) the push on each token's log-prob, with prox equal to the policy: minus the loss's gradient."""
    logp = logp.detach().requires_grad_()
    advantages = LeaveOneOut()(rewards.view(GROUPS, SIZE)).reshape(-1, 1)
    mask, fresh = torch.ones_like(logp, dtype=torch.bool), torch.ones(len(logp), dtype=torch.bool)
    rows = ObjectiveInputs(logp, logp.detach(), behave, advantages.to(logp), mask, fresh)
    loss, _ = Objective(weight)(rows, 1.0)
    return -torch.autograd.grad(loss, logp)[0]


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Returns distances of the means over groups from the exact gradient, in standard errors of those means."""
    of_groups = found.view(GROUPS, SIZE, -1).mean(1)
    return (of_groups.mean(0) - exact).abs() / (of_groups.std(0) / GROUPS**0.5)


@pytest.mark.parametrize(
    ("weight", "unbiased"),
    [
        (TruncatedIS(cap=None, correct_fresh=True), True),
        (SequenceIS("product", cap=None, correct_fresh=True), True),
        (TruncatedIS(cap=None), False),
        (NoCorrection(), False),
    ],
)
def test_one_token_is_unbiased_with_the_weight_alone(weight: BehaveWeight, unbiased: bool) -> None:
    """Token 1 has log-odds -4 and reward 1, so the gradient in the log-odds is p (1 - p)."""
    odds = torch.tensor(-4.0, dtype=torch.float64)
    at = temperatures(GROUPS, SIZE).reshape(-1)
    chance = torch.sigmoid(odds / at)
    right = torch.rand(len(at), generator=torch.Generator().manual_seed(1), dtype=torch.float64) < chance
    signs = torch.where(right, 1.0, -1.0).double()
    logp = torch.nn.functional.logsigmoid(signs * odds)[:, None]
    behave = torch.nn.functional.logsigmoid(signs * odds / at)[:, None]
    score = signs[:, None] * torch.sigmoid(-signs[:, None] * odds)
    found = errors(pushes(logp, behave, right.float(), weight) * score, torch.sigmoid(odds) * torch.sigmoid(-odds))
    assert (found < 3) if unbiased else (found > 10), found


LOGITS = torch.tensor([-4.0, 2.0, 1.0], dtype=torch.float64)  # log-odds of 1: first, after a 1, after a 0


def exact_gradient() -> Tensor:
    """Returns the gradient (3,) of the chance of 1 followed by 1."""
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(torch.sigmoid(logits[0]) * torch.sigmoid(logits[1]), logits)[0]


def two_tokens(weight: BehaveWeight) -> Tensor:
    """Returns gradients (R, 3) of sampled responses of two tokens. Only 1, 1 has a reward."""
    at = temperatures(GROUPS, SIZE).reshape(-1, 1)
    uniform = torch.rand(len(at), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = uniform[:, :1] < torch.sigmoid(LOGITS[0] / at)
    place = torch.cat((torch.zeros_like(first, dtype=torch.long), torch.where(first, 1, 2)), 1)
    tokens = torch.cat((first, uniform[:, 1:] < torch.sigmoid(LOGITS[place[:, 1:]] / at)), 1)
    signs, odds = torch.where(tokens, 1.0, -1.0).double(), LOGITS[place]
    logp = torch.nn.functional.logsigmoid(signs * odds)
    behave = torch.nn.functional.logsigmoid(signs * odds / at)
    push = pushes(logp, behave, tokens.all(1).float(), weight) * signs * torch.sigmoid(-signs * odds)
    return torch.zeros(len(at), 3, dtype=torch.float64).scatter_add_(1, place, push)


def test_a_response_is_unbiased_with_the_product_of_its_tokens_weights() -> None:
    exact = exact_gradient()
    product = errors(two_tokens(SequenceIS("product", cap=None, correct_fresh=True)), exact)
    nothing = errors(two_tokens(NoCorrection()), exact)
    assert bool((product < 3).all()) and float(nothing.max()) > 6, (product, nothing)


def test_weights_of_single_tokens_are_an_approximation() -> None:
    """They ignore how the tokens before and after were sampled, but are nearer than no weights."""
    exact = exact_gradient()
    weighted = two_tokens(TruncatedIS(cap=None, correct_fresh=True))
    single = weighted.mean(0) - exact
    nothing = two_tokens(NoCorrection()).mean(0) - exact
    assert float(errors(weighted, exact).max()) > 3
    assert float(single.norm()) < 0.5 * float(nothing.norm()), (single, nothing)


@pytest.mark.parametrize(("odds", "rises"), [(-5.0, True), (5.0, True), (0.0, False)])
def test_groups_near_all_or_nothing_are_effective_more_often(odds: float, rises: bool) -> None:
    """With q, the mean of a response's chance over temperatures, a group is effective with 1 - q^K - (1 - q)^K."""
    groups, size = 20_000, 8
    at = temperatures(groups, size)
    right = torch.rand(groups, size, generator=torch.Generator().manual_seed(3)) < torch.sigmoid(odds / at)
    effective = float(((right.sum(1) > 0) & (right.sum(1) < size)).double().mean())
    grid = torch.linspace(0.5, 1.5, 20_001, dtype=torch.float64)
    q, p = float(torch.sigmoid(odds / grid).mean()), float(torch.sigmoid(torch.tensor(odds)))
    expected, without = (1 - chance**size - (1 - chance) ** size for chance in (q, p))
    noise = (expected * (1 - expected) / groups) ** 0.5
    assert abs(effective - expected) < 3 * noise
    assert (effective > without + 5 * noise) if rises else abs(effective - without) < 3 * noise
