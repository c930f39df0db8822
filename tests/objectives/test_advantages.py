"""Advantage rules, checked against numbers worked out by hand and by identities between them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.groups import group
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.methods.asymre import ShiftedBaseline
from popo_lightning.methods.max_at_k import BestMinusSecond, MaxAtK
from popo_lightning.methods.opmd import SoftBaseline
from popo_lightning.methods.red import DropSurplusNegatives, ExponentialWeight
from popo_lightning.methods.tree_opo import TreeBaseline
from popo_lightning.objectives.advantages import Advantage, GroupNormalized, LeaveOneOut


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=1e-6)


def random_rewards(groups: int = 20, size: int = 6) -> Tensor:
    return torch.randn(groups, size, generator=torch.Generator().manual_seed(0))


def test_leave_one_out_by_hand() -> None:
    # The means of the others: (0 + 0 + 1) / 3, (1 + 0 + 1) / 3 twice, 1 / 3.
    close(LeaveOneOut()(torch.tensor([[1.0, 0.0, 0.0, 1.0]])), [[2 / 3, -2 / 3, -2 / 3, 2 / 3]])


@pytest.mark.parametrize("size", [2, 4, 7])
def test_leave_one_out_is_a_multiple_of_dr_grpo(size: int) -> None:
    rewards = random_rewards(size=size)
    close(LeaveOneOut()(rewards), size / (size - 1) * GroupNormalized(normalize_by_std=False)(rewards))


def test_shifted_baseline_by_hand() -> None:
    # Mean 1/4, baseline 0.15. Equal rewards keep 0.1 each, as intended.
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    close(ShiftedBaseline()(rewards), [[0.85, -0.15, -0.15, -0.15], [0.1, 0.1, 0.1, 0.1]])
    close(ShiftedBaseline(shift=0.25)(rewards[:1]), [[0.5, -0.5, -0.5, -0.5]])


def test_soft_baseline_by_hand() -> None:
    # With tau 1/log 3, exp(R / tau) is 3 and 1. Their mean is 2, so the baseline is log 2 / log 3.
    baseline = math.log(2) / math.log(3)
    close(SoftBaseline(tau=1 / math.log(3))(torch.tensor([[1.0, 0.0]])), [[1 - baseline, -baseline]])


def test_soft_baseline_goes_from_the_best_to_the_mean() -> None:
    rewards = random_rewards()
    torch.testing.assert_close(SoftBaseline(1e4)(rewards), GroupNormalized(False)(rewards), atol=1e-3, rtol=0)
    torch.testing.assert_close(SoftBaseline(1e-4)(rewards), rewards - rewards.amax(-1, True), atol=1e-3, rtol=0)


def test_drop_surplus_negatives_by_hand() -> None:
    # Mean 1/5: there are one winner and four losers, of which the first is kept. The mean of the kept is 1/2.
    close(DropSurplusNegatives()(torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])), [[-0.5, 0, 0.5, 0, 0]])
    # Mean 0.4: there are two winners and three losers. 1, 1, 0.1, -0.1 with mean 0.5 are kept, the last loser is
    # dropped.
    close(DropSurplusNegatives()(torch.tensor([[0.1, 1.0, -0.1, 1.0, 0.0]])), [[-0.4, 0.5, -0.6, 0.5, 0]])
    # A reward equal to the mean wins. With one loser nothing is dropped.
    close(DropSurplusNegatives()(torch.tensor([[0.5, 1.0, 0.0]])), [[0.0, 0.5, -0.5]])
    # The losers are in the minority, so nothing is dropped.
    close(DropSurplusNegatives()(torch.tensor([[1.0, 0.0, 1.0]])), [[1 / 3, -2 / 3, 1 / 3]])


def test_exponential_weight_by_hand() -> None:
    # A is 1/2 and -1/2. At temperature 1/2 the weights are e and 1/e.
    close(ExponentialWeight(0.5)(torch.tensor([[1.0, 0.0]])), [[0.5 * math.e, -0.5 / math.e]])
    assert ExponentialWeight(1e-6)(torch.tensor([[1.0, 0.0]])).isfinite().all()


def test_best_minus_second_by_hand() -> None:
    rewards = torch.tensor([[0.2, 1.0, 0.7, 0.0], [1.0, 0.0, 1.0, 0.0]])
    close(BestMinusSecond()(rewards), [[0, 0.3, 0, 0], [0, 0, 0, 0]])
    # Mean 0, squares 2, unbiased variance 2 / 2 = 1: the lead of 1 is divided by 1 + 1.
    close(BestMinusSecond(True, eps=1.0)(torch.tensor([[1.0, -1.0, 0.0]])), [[0.5, 0, 0]])


@pytest.mark.parametrize("size", [2, 5])
def test_best_minus_second_is_the_best_of_all_with_the_others_as_baseline(size: int) -> None:
    rewards = random_rewards(size=size)
    close(BestMinusSecond()(rewards), MaxAtK(size, baseline="leave_one_out")(rewards) / size)


@pytest.mark.parametrize(("kind", "baseline"), [("mean", 0.4), ("max", 1.0), ("min", 0.0)])
def test_tree_baseline_by_hand(kind: str, baseline: float) -> None:
    # The group's own rewards are 1, 0, the deeper ones 1, 0, 0.
    found = TreeBaseline(kind).for_group(  # type: ignore[arg-type]
        replace(group(1, scores=(1.0, 0.0)), subtree_rewards=torch.tensor([1.0, 0.0, 0.0])), "score"
    )
    close(torch.stack(found), [1 - baseline, -baseline])


def test_tree_baseline_without_deeper_restarts_is_the_groups() -> None:
    rewards = random_rewards()
    close(TreeBaseline()(rewards), GroupNormalized(False)(rewards))
    close(torch.stack(TreeBaseline().for_group(group(1, scores=(1.0, 0.0, 0.0)), "score")), [2 / 3, -1 / 3, -1 / 3])


def test_an_all_wrong_group_beside_right_restarts_learns() -> None:
    wrong = group(1, scores=(0.0, 0.0))
    found = TreeBaseline().for_group(replace(wrong, subtree_rewards=torch.tensor([1.0, 1.0])), "score")
    close(torch.stack(found), [-0.5, -0.5])
    found = TreeBaseline().for_group(replace(wrong, subtree_rewards=torch.tensor([0.0])), "score")
    assert torch.equal(torch.stack(found), torch.zeros(2))


GROUP_RELATIVE: list[Advantage] = [
    GroupNormalized(),
    LeaveOneOut(),
    SoftBaseline(),
    DropSurplusNegatives(),
    ExponentialWeight(),
    BestMinusSecond(),
    BestMinusSecond(True),
    TreeBaseline("mean"),
    TreeBaseline("max"),
    TreeBaseline("min"),
    MaxAtK(2, baseline="leave_one_out"),
    MaxAtK(2, baseline="centered"),
]


@pytest.mark.parametrize("rule", GROUP_RELATIVE, ids=lambda rule: type(rule).__name__)
def test_ineffective_groups_get_exactly_zero(rule: Advantage) -> None:
    """This includes groups whose rounding leaves a small rest: seven 0.1 in float32, and a spread below 1e-6."""
    for size in (3, 7, 24):
        rewards = torch.full((2, size), 0.1)
        rewards[1, 0] += 2e-7
        assert torch.equal(rule(rewards), torch.zeros(2, size))
        rewards[1, 0] = 0.2
        assert rule(rewards)[1].any()


@pytest.mark.parametrize("rule", [*GROUP_RELATIVE, ShiftedBaseline(), MaxAtK(2)], ids=lambda rule: type(rule).__name__)
def test_a_group_in_a_minibatch_gets_what_the_rule_gives(rule: Advantage) -> None:
    scores, accs = (0.3, 1.0, 0.0, 0.1), (0.0, 1.0, 1.0, 0.0)
    for part, rewards in (("score", scores), ("acc", accs)):
        found = rule.for_group(group(1, scores=scores, accs=accs), part)
        assert [each.shape for each in found] == [torch.Size([])] * 4
        assert torch.equal(torch.stack(found), rule(torch.tensor([rewards]))[0])
    assert not (rule.needs_prox or rule.needs_values or rule.whitens or rule.includes_is_weight)


@pytest.mark.parametrize("rule", GROUP_RELATIVE, ids=lambda rule: type(rule).__name__)
def test_a_group_of_one_is_refused(rule: Advantage) -> None:
    with pytest.raises(SettingError, match=r"at least [23] responses"):
        rule(torch.ones(3, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShiftedBaseline(math.nan),
        lambda: SoftBaseline(0),
        lambda: ExponentialWeight(0),
        lambda: BestMinusSecond(eps=-1),
        lambda: TreeBaseline("median"),  # type: ignore[arg-type]
    ],
)
def test_settings_are_checked(make: object) -> None:
    with pytest.raises(SettingError, match=r"^\w+\.\w+ is "):
        make()  # type: ignore[operator]
