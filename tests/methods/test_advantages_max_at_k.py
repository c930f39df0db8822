"""MaxAtK, checked by brute force over all subsets of a group and over all groups of a tiny policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.groups import group
from helpers.tiny_models import fit, tiny_task
from torch import Tensor

from popo_lightning.cli.combinations import check_combination
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.methods.max_at_k import Baseline, MaxAtK, max_at_k, max_at_k_advantages
from popo_lightning.objectives.advantages import LeaveOneOut, check_weight
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.weights import NoCorrection, TruncatedIS
from popo_lightning.policy import PolicyModule


def rewards_and_deviations(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns unsorted rewards of both signs with ties, and deviations as large as the cap allows."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(size, generator=generator, dtype=torch.float64)
    rewards[size // 2] = rewards[0]
    return rewards, 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1


def by_brute_force(rewards: Tensor, deviation: Tensor, k: int, baseline: Baseline) -> Tensor:
    """Computes K / C(K, k) times the sum over subsets, as the definition says."""
    size, found = len(rewards), torch.zeros(len(rewards), dtype=torch.float64)
    for subset in itertools.combinations(range(size), k):
        best = max(float(rewards[member]) for member in subset)
        weight = 1 + sum(float(deviation[member]) for member in subset)
        for i in range(size):
            others = [member for member in subset if member != i]
            if i in subset:
                found[i] += weight * best
            if baseline == "leave_one_out" and i in subset:
                rest = [float(rewards[member]) for member in others]
                without = [float(rewards[j]) for j in range(size) if j != i]
                found[i] -= weight * (max(rest) if rest else sum(without) / len(without))
            if baseline == "centered":
                with_i = weight if i in subset else weight + float(deviation[i])
                found[i] -= k / size * with_i * best
    found = found * size / math.comb(size, k)
    return found * size / (size - k) if baseline == "centered" else found


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "centered"])
@pytest.mark.parametrize("size", [4, 6, 8])
def test_on_and_off_policy_weights_match_all_subsets(size: int, baseline: Baseline) -> None:
    for k in range(1, size + (baseline != "centered")):
        for seed in range(3):
            rewards, deviation = rewards_and_deviations(size, seed)
            for given in (torch.zeros(size, dtype=torch.float64), deviation):
                expected = by_brute_force(rewards, given, k, baseline)
                found = max_at_k_advantages(rewards, k, given, baseline)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(
                max_at_k_advantages(rewards, k, None, baseline),
                max_at_k_advantages(rewards, k, torch.zeros(size), baseline),
                rtol=0,
                atol=0,
            )


def test_by_hand() -> None:
    # K = 3, k = 2, rewards 0, 1, 3: the subsets {0,1}, {0,3}, {1,3} have best rewards 1, 3, 3. The sums are 1 + 3, 1 +
    # 3, 3 + 3, times K / C(3, 2) = 1.
    torch.testing.assert_close(MaxAtK(2)(torch.tensor([[1.0, 3.0, 0.0]])), torch.tensor([[4.0, 6.0, 4.0]]))
    # Minus the best of the rest: (1-0) + (3-3) = 1, 3 - 1 + 3 - 0 = 5, and (1-1) + (3-3) = 0.
    found = MaxAtK(2, baseline="leave_one_out")(torch.tensor([[1.0, 3.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 5.0, 0.0]]))
    # Minus k times the metric 7/3, times K / (K - k) = 3: 3 * (4 - 14/3) = -2.
    found = MaxAtK(2, baseline="centered")(torch.tensor([[1.0, 3.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[-2.0, 4.0, -2.0]]))


def test_max_at_one_is_the_mean_and_max_at_n_the_maximum() -> None:
    rewards, _ = rewards_and_deviations(6, 0)
    torch.testing.assert_close(max_at_k(rewards, 1), rewards.mean())
    torch.testing.assert_close(max_at_k(rewards, 6), rewards.max())
    subsets = itertools.combinations(rewards.tolist(), 3)
    torch.testing.assert_close(
        max_at_k(rewards, 3), torch.tensor([max(each) for each in subsets], dtype=torch.float64).mean()
    )
    # For k = 1 the advantages are the rewards, for k = K they are K times the best reward.
    torch.testing.assert_close(MaxAtK(1)(rewards[None]), rewards[None])
    torch.testing.assert_close(MaxAtK(6)(rewards[None])[0], 6 * rewards.max().expand(6))
    for baseline in ("leave_one_out", "centered"):
        torch.testing.assert_close(MaxAtK(1, baseline=baseline)(rewards[None]), LeaveOneOut()(rewards[None]))


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "centered"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_gradient_is_that_of_the_expected_best(k: int, baseline: Baseline) -> None:
    """Sums exactly over all 3^4 groups of a softmax policy with three answers, weighted by their probability."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    worth, size = torch.tensor([0.0, 1.0, 0.4], dtype=torch.float64), 4
    logp = logits.log_softmax(0)
    surrogate, expected = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for answers in itertools.product(range(3), repeat=size):
        drawn = logp[list(answers)]
        advantages = max_at_k_advantages(worth[list(answers)], k, None, baseline)
        surrogate = surrogate + drawn.detach().sum().exp() * (advantages * drawn).mean()
    for answers in itertools.product(range(3), repeat=k):
        expected = expected + logp[list(answers)].sum().exp() * worth[list(answers)].max()
    (found,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    (true,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def shifted(asked: Group, shifts: list[list[float]]) -> list[Tensor]:
    """Returns proximal log-probs that differ from the behavior policy's by the shifts."""
    pairs = zip(asked.responses, shifts, strict=True)
    return [response.behave_logp + torch.tensor(shift) for response, shift in pairs]


def test_ratios_are_of_whole_responses_and_capped() -> None:
    asked = group(1, scores=(0.0, 1.0, 0.0, 1.0))
    prox = shifted(asked, [[0.0, 0.0], [0.1, 0.2], [-1.0, 0.5], [9.0, 9.0]])
    found = MaxAtK(2, off_policy=True, ratio_cap=3.0).deviation(asked, prox)
    expected = torch.tensor([0.0, math.exp(0.3) - 1, math.exp(-0.5) - 1, 2.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_replayed_groups_are_corrected_only_where_asked() -> None:
    asked = group(1, scores=(0.0, 1.0, 0.4, 1.0))
    shifts = [[0.1, 0.2], [-0.3, 0.0], [0.0, 0.0], [0.2, 0.2]]
    plain, corrected = MaxAtK(3), MaxAtK(3, off_policy=True)
    assert (plain.needs_prox, corrected.needs_prox, corrected.includes_is_weight) == (False, True, True)
    on_policy = torch.stack(plain.for_group(asked, "score", shifted(asked, shifts)))
    assert torch.equal(on_policy, plain(asked.rewards()[None])[0])
    assert torch.equal(on_policy, torch.stack(corrected.for_group(asked, "score", None)))
    deviation = torch.tensor([math.exp(sum(shift)) - 1 for shift in shifts], dtype=torch.float64)
    expected = by_brute_force(asked.rewards().double(), deviation, 3, "none").float()
    found = torch.stack(corrected.for_group(asked, "score", shifted(asked, shifts)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_behavior_policy_is_not_corrected_for_twice() -> None:
    check_weight(MaxAtK(2, off_policy=True), NoCorrection())
    check_weight(MaxAtK(2), TruncatedIS())
    with pytest.raises(SettingError, match=r"behave_weight is TruncatedIS, .*MaxAtK.*use NoCorrection"):
        check_weight(MaxAtK(2, off_policy=True), TruncatedIS())


def test_groups_too_small_are_refused() -> None:
    for rule, needed in ((MaxAtK(5), 5), (MaxAtK(4, baseline="centered"), 5)):
        with pytest.raises(SettingError, match=f"groups of at least {needed} responses, and a group has 4"):
            rule(torch.ones(1, 4))


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": 2, "baseline": "mean"}, {"k": 2, "ratio_cap": 0.5}])
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=r"^MaxAtK\.\w+ is "):
        MaxAtK(**settings)  # type: ignore[arg-type]


def test_a_training_corrects_replayed_groups(policy: Path, tmp_path: Path) -> None:
    """The correction uses the proximal policy, which needs log-probs for the first minibatch too."""
    seen: list[bool] = []

    class Watched(MaxAtK):
        def deviation(self, group: Group, prox_logp: Sequence[Tensor]) -> Tensor:
            found = super().deviation(group, prox_logp)
            seen.append(bool(found.abs().max() > 1e-3))
            return found

    advantage = Watched(2, off_policy=True, baseline="centered")
    run = fit(policy, tmp_path, objective=Objective(NoCorrection()), model={"advantage": advantage}, iterations=4)
    assert sum(row["replay/groups"] for row in run.rows) > 0
    assert any(seen)
    assert all(torch.isfinite(parameter).all() for parameter in run.module.parameters())


def test_its_own_weight_corrects_for_older_weights() -> None:
    data = RolloutDataModule(tiny_task(), TransformersEngine(), weight_sync_interval=2)
    plain, weighted = (
        PolicyModule(path="none", behave_weight=NoCorrection(), advantage=MaxAtK(2, off_policy=own))
        for own in (False, True)
    )
    with pytest.raises(SettingError, match=r"data.weight_sync_interval is 2, so responses come from older weights"):
        check_combination(plain, data, [])
    check_combination(weighted, data, [])
