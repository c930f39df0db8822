"""M2PO, balanced bounds and scaled width, by hand and by identity (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from helpers.objectives import close, loss_and_gradient, outcome, part_of, random_rows, token_rows, tokens_of

from popo_lightning.methods.bapo_balanced import BalancedClip, positive_share, steps
from popo_lightning.methods.m2po import M2PO, harmful, second_moment_cut
from popo_lightning.methods.remix import ScaledWidth
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.inputs import MinibatchTokens, log_ratio
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.trust_regions import PPOClip, Unbounded
from popo_lightning.objectives.weights import NoCorrection, TruncatedIS, decoupled_weight

# -- M2PO


def test_second_moment_cut_by_hand() -> None:
    # The squares are 1, 4, 9, 16. All cut at v: sums 1 * 4, 1 + 4 * 3, 1 + 4 + 9 * 2, 30; means 1, 3.25, 5.75, 7.5.
    squares = torch.tensor([16.0, 1.0, 9.0, 4.0])
    expected = [(7.5, math.inf), (7.4, 3.0), (5.8, 3.0), (5.7, 2.0), (3.3, 2.0), (3.2, 1.0), (1.1, 1.0), (0.9, 0.0)]
    for budget, cut in expected:
        assert second_moment_cut(squares, budget) == cut, budget
    assert second_moment_cut(torch.tensor([]), 0.04) == math.inf


def test_harmful_tokens_are_those_going_on() -> None:
    logs = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0])
    assert harmful(logs, advantages).tolist() == [True, False, False, True, False, False]


def test_m2po_by_hand() -> None:
    # Log ratios to behave of 0.5, 1, 2 with A > 0 and of -1 with A < 0 are harmful; -3 with A > 0 is not. The squares
    # 0.25, 1, 4, 1 have mean 1.5625. Cut at 1: (0.25 + 1 + 1 + 1) / 4 = 0.8125 <= 1; cut at 2 it is too much. So tau =
    # 1.
    logs = [0.5, 1.0, 2.0, -1.0, -3.0]
    rows = token_rows([[math.exp(x) for x in logs]], [[1.0, 1.0, 1.0, -1.0, 1.0]])
    region = M2PO(budget=1.0)
    found = region.for_minibatch(tokens_of(rows)).report()
    assert found == pytest.approx({"m2": 1.5625, "m2_cut": 1.0, "clip_low": 1 - math.exp(-1), "clip_high": math.e - 1})
    loss, gradient, clipped = outcome(region, rows)
    # Rounding decides whether tokens at the cut itself keep their gradient. Beyond it no token has one.
    assert clipped[0][2] and not clipped[0][0] and not clipped[0][4]
    close(loss, [[-math.exp(0.5), -math.e, -math.e, math.exp(-1), -math.exp(-3)]])
    close(gradient[0, [0, 2, 4]], [-math.exp(0.5), 0.0, -math.exp(-3)])


def test_m2_is_to_behave_and_on_fresh_rows_to_prox() -> None:
    # r = 1.5 and w = 2: the log ratio is log 3 to behave, log 1.5 to prox.
    for fresh, ratio in ((False, 3.0), (True, 1.5)):
        rows = token_rows([[1.5, 1.5]], [[1.0, 1.0]], [[2.0, 2.0]], fresh)
        assert M2PO().for_minibatch(tokens_of(rows)).report()["m2"] == pytest.approx(math.log(ratio) ** 2)


def test_log_ratios_are_bounded_in_what_is_found() -> None:
    # e^30 counts as e^20: a square of 400, and a share of one half against A = e^20 / 1.2.
    rows = token_rows([[math.exp(30.0), 1.0]], [[1.0, 0.0]])
    assert M2PO().for_minibatch(tokens_of(rows)).report()["m2"] == pytest.approx(400)
    rows = token_rows([[math.exp(30.0), 2.0]], [[-1.0, math.exp(20.0) / 1.2]])
    assert BalancedClip().for_minibatch(tokens_of(rows)).report()["positive_share"] == pytest.approx(0.5)


def test_m2po_clips_nothing_within_its_budget() -> None:
    rows = random_rows()
    rows.fresh = torch.zeros_like(rows.fresh)
    region = M2PO(budget=100.0)
    loss, gradient, clipped = outcome(region, rows)
    assert not torch.tensor(clipped).any()
    rho = log_ratio(rows.logp, rows.behave_logp, rows.mask).exp().detach()
    close(loss[rows.mask], (-rho * rows.advantages)[rows.mask])
    close(gradient, loss)
    assert set(region.for_minibatch(tokens_of(rows)).report()) == {"m2", "clip_low"}  # the other bounds are infinite
    # A budget slightly above m2 clips nothing, one slightly below it clips something.
    m2 = region.for_minibatch(tokens_of(rows)).report()["m2"]
    assert not torch.tensor(outcome(M2PO(m2 * 1.001, 0.0, 0.0), rows)[2]).any()
    assert torch.tensor(outcome(M2PO(m2 * 0.999, 0.0, 0.0), rows)[2]).any()


def test_m2po_is_never_narrower_than_its_floors() -> None:
    rows = random_rows()
    rows.fresh = torch.zeros_like(rows.fresh)
    found = M2PO(budget=1e-9).for_minibatch(tokens_of(rows)).report()
    assert found["clip_low"] == 0.3 and found["clip_high"] == 0.5 and found["m2_cut"] < 0.1
    expected = outcome(BehaveAligned(0.3, 0.5, None), rows)
    close(outcome(M2PO(budget=1e-9), rows)[1], expected[1])


def test_m2po_holds_for_the_whole_minibatch() -> None:
    # Bounds found from all rows apply to each part, so the parts add up. With bounds found by part they would not.
    rows = random_rows()
    rows.fresh = torch.zeros_like(rows.fresh)
    for region in (M2PO(0.3, 0.0, 0.0), BalancedClip()):
        objective = Objective(NoCorrection(), region).for_minibatch(tokens_of(rows))
        loss, gradient = loss_and_gradient(objective, rows)
        parts = [part_of(rows, s) for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
        found = [loss_and_gradient(objective, p, rows.mask.sum()) for p in parts]
        close(torch.stack([x for x, _ in found]).sum(), loss, rtol=1e-12, atol=1e-12)
        close(torch.cat([g for _, g in found]), gradient, rtol=1e-12, atol=1e-12)
        alone = [region.for_minibatch(tokens_of(p)).report() for p in parts]
        assert any(a != objective.report() for a in alone)


# -- BAPO's balance


def test_steps() -> None:
    close(torch.tensor(steps(0.6, 0.9, 0.1)), [0.6, 0.7, 0.8, 0.9])
    close(torch.tensor(steps(0.6, 0.9, 0.2)), [0.6, 0.8, 0.9])
    close(torch.tensor(steps(0.6, 0.9, 0.05)), [0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9])
    assert steps(1.2, 1.2, 0.1) == [1.2]


def tokens(ratio: list[float], advantages: list[float]) -> MinibatchTokens:
    return tokens_of(token_rows([ratio], [advantages]))


def test_positive_share_by_hand() -> None:
    # Positive: min(2, 1.2) * 1 + min(0.5, 1.2) * 2 = 2.2. Negative: max(0.1, 0.6) * 1 + max(3, 0.6) * 1 = 3.6.
    ratio, advantages = torch.tensor([2.0, 0.5, 0.1, 3.0, 9.0]), torch.tensor([1.0, 2.0, -1.0, -1.0, 0.0])
    assert positive_share(ratio, advantages, 0.6, 1.2) == pytest.approx(2.2 / 5.8)
    assert positive_share(ratio, advantages.abs(), 0.6, 1.2) == 1.0


def test_balanced_clip_by_hand() -> None:
    # One good token has ratio 4, one bad token ratio 1 and |A| = 1. The share is min(4, high) A / (min(4, high) A + 1).
    def found(advantage: float) -> dict[str, float]:
        region = BalancedClip(0.6, 0.9, 1.2, 3.0, step=0.1)
        return region.for_minibatch(tokens([4.0, 1.0], [advantage, -1.0])).report()

    # A = 1: 1.2 / 2.2 is enough from the start.
    assert found(1.0) == pytest.approx({"clip_low": 0.4, "clip_high": 0.2, "positive_share": 1.2 / 2.2})
    # A = 0.5: the lower bound does not affect a ratio of 1 and goes to its end. Then high = 2 gives 1 / 2.
    assert found(0.5) == pytest.approx({"clip_low": 0.1, "clip_high": 1.0, "positive_share": 0.5})
    # A = 0.1: the target is out of reach, so the bounds are the widest.
    assert found(0.1) == pytest.approx({"clip_low": 0.1, "clip_high": 2.0, "positive_share": 0.3 / 1.3})


def test_the_lower_bound_moves_first() -> None:
    # A bad token with ratio 0.1 counts as much as the lower bound. Raising the bound makes it count more, so the share
    # falls. With a target out of reach both bounds go to their ends. With a target reached at the start neither moves.
    region = BalancedClip(step=0.1, target=0.6)
    assert region.bounds[0] == (0.6, 1.2) and region.bounds[-1] == (0.9, 3.0)
    lows, highs = zip(*region.bounds, strict=True)
    assert list(lows) == sorted(lows) and list(highs) == sorted(highs)
    assert all(high == 1.2 or low == 0.9 for low, high in region.bounds)
    near = region.for_minibatch(tokens([1.0, 0.1], [0.9, -1.0])).report()
    assert near["clip_low"] == pytest.approx(0.4)  # 0.9 / (0.9 + 0.6) = 0.6: just reached


def test_balance_is_of_the_ratio_to_prox() -> None:
    # r = 1 for both, w = 4 for the good token: the share is 0.5 to prox. To behave it would be 1.2 / 2.2.
    rows = token_rows([[1.0, 1.0]], [[1.0, -1.0]], [[4.0, 1.0]])
    assert BalancedClip().for_minibatch(tokens_of(rows)).report()["positive_share"] == pytest.approx(0.5)
    around_behave = BalancedClip(center="behave").for_minibatch(tokens_of(rows))
    assert around_behave.report()["positive_share"] == pytest.approx(1.2 / 2.2)
    # The good token's ratio of 4 to behave is held at 1.2. Its ratio of 1 to prox is not held.
    assert outcome(around_behave, rows)[2] == [[True, False]] and outcome(BalancedClip(), rows)[2] == [[False, False]]


def test_balanced_clip_has_a_dual_clip_of_three() -> None:
    rows = token_rows([[5.0, 5.0]], [[-1.0, 1.0]])
    close(outcome(BalancedClip(), rows)[0][0, :1], [3.0])
    close(outcome(BalancedClip(dual_clip=None), rows)[0][0, :1], [5.0])


def test_balanced_clip_is_ppo_with_the_bounds_found() -> None:
    rows = random_rows()
    region = BalancedClip(step=0.1, dual_clip=1.5)
    found = region.for_minibatch(tokens_of(rows)).report()
    loss, gradient, clipped = outcome(region, rows)
    expected = outcome(PPOClip(found["clip_low"], found["clip_high"], 1.5), rows)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1]) and clipped == expected[2]


def test_minibatch_tokens_are_read_whole() -> None:
    rows = random_rows()
    flat = tokens_of(rows)
    assert all(getattr(flat, f.name).shape == (int(rows.mask.sum()),) for f in fields(MinibatchTokens))


# -- ReMix


def test_scaled_width_is_remix() -> None:
    # w * (PPO around prox with eps / w) = max(-rho A, -clamp(rho, w - eps, w + eps) A), rho = pi_policy / pi_behave.
    rows = random_rows()
    rows.fresh = torch.zeros_like(rows.fresh)
    weight = decoupled_weight(rows)
    rho = log_ratio(rows.logp, rows.behave_logp, rows.mask).exp()
    bounded = rho.clamp(weight - 0.2, weight + 0.2)
    exact = torch.where(rows.mask, torch.maximum(-rho * rows.advantages, -bounded * rows.advantages), 0.0)
    loss, gradient = loss_and_gradient(Objective(TruncatedIS(cap=None), ScaledWidth(0.2)), rows)
    close(loss, exact.sum().detach() / rows.mask.sum())
    close(gradient, torch.autograd.grad(exact.sum() / rows.mask.sum(), rows.logp)[0])
    _, ordinary = loss_and_gradient(Objective(TruncatedIS(cap=None), PPOClip(0.2, 0.2, None)), rows)
    assert (gradient - ordinary).abs().max() > 1e-3


def test_scaled_width_on_fresh_rows_is_ppo() -> None:
    rows = random_rows()
    rows.fresh = torch.ones_like(rows.fresh)
    for dual in (None, 1.5):
        scaled = loss_and_gradient(Objective(TruncatedIS(), ScaledWidth(0.2, dual)), rows)
        plain = loss_and_gradient(Objective(TruncatedIS(), PPOClip(0.2, 0.2, dual)), rows)
        close(scaled[0], plain[0])
        close(scaled[1], plain[1])


def test_scaled_width_with_a_weight_of_zero_is_unbounded() -> None:
    rows = random_rows()
    loss, _, clipped = outcome(ScaledWidth(0.2), rows, torch.zeros_like(rows.prox_logp))
    assert loss.isfinite().all() and not torch.tensor(clipped).any()
    close(loss, outcome(Unbounded(), rows)[0])
