"""SAT and PNPO, by hand and by identity (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.objectives import (
    close,
    loss_and_gradient,
    outcome,
    part_of,
    random_rows,
    stale_rows,
    token_rows,
    tokens_of,
)

from popo_lightning.methods.pnpo import PNPO, PrefixIS, prefix_ratio
from popo_lightning.methods.sat import SAT, contraction, tail_cut
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.inputs import log_ratio, sampled_logp, sequence_log_ratio
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.trust_regions import PPOClip, clipped_surrogate
from popo_lightning.objectives.weights import NoCorrection, SequenceIS, TruncatedIS

# -- SAT


def test_tail_cut_by_hand() -> None:
    numbers = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 10.0, 6.0, 9.0, 7.0, 8.0])
    expected = [(0.9, 9.0), (0.91, 10.0), (0.85, 9.0), (0.8, 8.0), (0.1, 1.0), (0.05, 1.0), (0.99, 10.0)]
    for quantile, cut in expected:
        assert tail_cut(numbers, quantile) == cut, quantile
    assert tail_cut(torch.tensor([]), 0.9) == 0.0


def test_contraction_by_hand() -> None:
    # With a cut of 0.5 the factor at 1 and 1.5 is 1 / (1 + 2^2) and 1 / (1 + 3^2). Up to the cut nothing is contracted.
    staleness = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5])
    close(contraction(staleness, 0.5, 2.0), [1.0, 1.0, 1.0, 0.2, 0.1])
    close(contraction(staleness, 0.5, 1.0), [1.0, 1.0, 1.0, 1 / 3, 0.25])
    close(contraction(staleness, 0.5, 0.0), [1.0, 1.0, 1.0, 0.5, 0.5])
    assert torch.equal(contraction(staleness, 0.0, 2.0), torch.ones(5))


def test_sat_by_hand() -> None:
    # Log-ratios to behave are 0.1 (eight times), 0.2, -0.3, and the quantile 0.8 is 0.1. Factors of the other two are 1
    # / (1 + 4) and 1 / (1 + 9). So with bounds of 0.2 the ninth is held at 1.04, and the tenth, with A < 0, at 1 -
    # 0.02.
    logs = [0.1] * 8 + [0.2, -0.3]
    advantages = [1.0] * 8 + [1.0, -1.0]
    rows = token_rows([[math.exp(x) for x in logs]], [advantages])
    region = SAT(quantile=0.8)
    loss, gradient, clipped = outcome(region, rows)
    close(loss[0, 7:], [-math.exp(0.1), -1.04, 0.98])
    close(gradient[0, 7:], [-math.exp(0.1), 0.0, 0.0])
    assert clipped == [[False] * 8 + [True, True]]
    found = region.for_minibatch(tokens_of(rows)).report()
    expected = {"stale_cut": 0.1, "stale_share": 0.2, "factor_mean": (8 + 0.2 + 0.1) / 10, "factor_min": 0.1}
    assert found == pytest.approx(expected)
    # If they move back, the same tokens are as free as under PPO.
    rows.advantages = -rows.advantages
    assert not torch.tensor(outcome(region, rows)[2]).any()


def test_only_the_end_on_the_advantages_side_is_contracted() -> None:
    # The paper contracts one end of a stale token's range. The other never binds, so contracting both is the same.
    rows = random_rows()
    region = SAT(0.2, 0.28, quantile=0.5).for_minibatch(tokens_of(rows))
    assert isinstance(region, SAT) and region.cut
    factor = contraction(log_ratio(rows.logp, sampled_logp(rows), rows.mask).abs().detach(), region.cut, 2.0)
    ratio = log_ratio(rows.logp, rows.prox_logp, rows.mask).exp()
    up = rows.advantages > 0
    bounds = 0.2 * torch.where(up, 1.0, factor), 0.28 * torch.where(up, factor, 1.0)
    exact = clipped_surrogate(ratio, rows.advantages, rows.mask, *bounds)
    found = region(rows, torch.ones_like(ratio))
    assert torch.equal(found.loss, exact.loss) and torch.equal(found.clipped, exact.clipped)
    (gradient,) = torch.autograd.grad(exact.loss.sum(), rows.logp, retain_graph=True)
    assert torch.equal(torch.autograd.grad(found.loss.sum(), rows.logp)[0], gradient)
    assert (factor[rows.mask] < 1).any()


def test_sat_is_within_ppo() -> None:
    # Pessimism: no token's loss is below PPO's, and tokens that PPO clips are clipped. Ordinary tokens equal PPO's bit
    # for bit.
    rows = random_rows(rows=12, tokens=8)
    ppo = outcome(PPOClip(0.2, 0.28, 10.0), rows)
    sat = outcome(SAT(0.2, 0.28, 0.6, dual_clip=10.0), rows)
    assert bool((sat[0] >= ppo[0]).all()) and not torch.equal(sat[0], ppo[0])
    held, before = torch.tensor(sat[2]), torch.tensor(ppo[2])
    assert bool((held | ~before).all()) and int(held.sum()) > int(before.sum())
    behave = sampled_logp(rows)
    cut = tail_cut((rows.logp.detach() - behave)[rows.mask].abs(), 0.6)
    ordinary = log_ratio(rows.logp, behave, rows.mask).abs() <= cut
    assert torch.equal(sat[0][ordinary], ppo[0][ordinary]) and torch.equal(sat[1][ordinary], ppo[1][ordinary])


def test_sat_has_a_dual_clip() -> None:
    rows = token_rows([[5.0, 5.0]], [[-1.0, -0.5]])
    close(outcome(SAT(dual_clip=2.0), rows)[0], [[2.0, 1.0]])
    close(outcome(SAT(), rows)[0], [[5.0, 2.5]])


def test_sat_without_movement_is_ppo() -> None:
    # Nine of ten tokens have not moved, so a cut of 0 does not judge the tenth.
    rows = token_rows([[1.0] * 9 + [1.5]], [[1.0] * 10])
    found = outcome(SAT(), rows)
    assert all(map(torch.equal, found[:2], outcome(PPOClip(0.2, 0.2, None), rows)[:2]))
    assert SAT().for_minibatch(tokens_of(rows)).report()["stale_share"] == 0


def test_sat_with_a_far_quantile_is_the_clip() -> None:
    rows = random_rows()
    rows.fresh = torch.zeros_like(rows.fresh)
    for region, plain in (
        (SAT(0.2, 0.28, 1 - 1e-6, dual_clip=1.5), PPOClip(0.2, 0.28, 1.5)),
        (SAT(0.2, 0.28, 1 - 1e-6, center="behave"), BehaveAligned(0.2, 0.28, None)),
    ):
        found, expected = outcome(region, rows), outcome(plain, rows)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] == expected[2]


def test_staleness_is_to_behave_and_the_clip_around_the_centre() -> None:
    # r = 1.1 to prox everywhere, w = 3 on the second token: its log-ratio to behave is log 3.3, the cut is log 1.1.
    rows = token_rows([[1.1, 1.1]], [[1.0, 1.0]], [[1.0, 3.0]])
    region = SAT(0.2, 0.2, 0.5)
    factor = 1 / (1 + (math.log(3.3) / math.log(1.1)) ** 2)
    close(outcome(region, rows)[0], [[-1.1, -1 - 0.2 * factor]])
    # Around behave the first token's ratio is 1.1 and the second's 3.3.
    loss, _, clipped = outcome(SAT(0.2, 0.2, 0.5, center="behave"), rows)
    close(loss, [[-1.1, -1 - 0.2 * factor]])
    assert clipped == [[False, True]]
    # On fresh rows behave is prox, so both tokens are equally stale.
    rows.fresh = torch.ones_like(rows.fresh)
    close(outcome(region, rows)[0], [[-1.1, -1.1]])


def test_sats_cut_is_of_bounded_log_ratios() -> None:
    rows = token_rows([[math.exp(30.0), 1.0]], [[1.0, 1.0]])
    assert SAT(quantile=0.99).for_minibatch(tokens_of(rows)).report()["stale_cut"] == 20


def test_sat_holds_for_the_whole_minibatch() -> None:
    rows = random_rows()
    region = SAT(quantile=0.6)
    objective = Objective(TruncatedIS(), region).for_minibatch(tokens_of(rows))
    loss, gradient = loss_and_gradient(objective, rows)
    parts = [part_of(rows, s) for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    found = [loss_and_gradient(objective, p, rows.mask.sum()) for p in parts]
    close(torch.stack([x for x, _ in found]).sum(), loss, rtol=1e-12, atol=1e-12)
    close(torch.cat([g for _, g in found]), gradient, rtol=1e-12, atol=1e-12)
    assert region.cut is None and region.report() == {}, "a minibatch's cut is not the next one's"


# -- PNPO


def test_prefix_ratio_by_hand() -> None:
    # The ratios 4, 1/4, 8 give roots 4, sqrt(1) = 1, and the cube root of 8 = 2. The second row ends after two tokens.
    rows = token_rows([[4.0, 0.25, 8.0], [9.0, 4.0, math.nan]], [[1.0], [1.0]])
    close(prefix_ratio(rows.logp.detach(), rows.prox_logp, rows.mask), [[4.0, 1.0, 2.0], [9.0, 6.0, 1.0]])


def test_prefix_ratio_ends_at_gspos_and_begins_at_the_tokens() -> None:
    rows = random_rows()
    found = prefix_ratio(rows.logp.detach(), rows.prox_logp, rows.mask)
    last = rows.mask.sum(-1, keepdim=True) - 1
    close(found.gather(1, last), sequence_log_ratio(rows.logp.detach(), rows.prox_logp, rows.mask).exp())
    close(found[:, 0], log_ratio(rows.logp.detach(), rows.prox_logp, rows.mask).exp()[:, 0])


def test_pnpo_by_hand() -> None:
    # w = 1.5, sqrt(1.5 * 2) = 1.73, cube root of 1.5 * 2 * 3 = 2.08, then 9 / 90 -> 0.1^(1/4) = 0.56. Bounds are 0.5
    # and 2.
    rows = token_rows([[1.5, 2.0, 3.0, 1 / 90]], [[1.0, -1.0, 1.0, 2.0]])
    loss, gradient, clipped = outcome(PNPO(), rows)
    expected = [-1.5, math.sqrt(3.0), 0.0, -2 * 0.1**0.25]
    close(gradient, [expected])
    close(loss, [[g * float(x) for g, x in zip(expected, rows.logp.detach()[0], strict=True)]])
    assert clipped == [[False, False, True, False]]
    # It is clipped below the band too, whatever the advantage's sign. A ratio at a bound is kept.
    rows = token_rows([[0.49], [0.5], [2.0]], [[1.0], [-1.0], [1.0]])
    rows.logp = torch.tensor([[math.log(0.49)], [math.log(0.5)], [math.log(2.0)]], dtype=torch.float64)
    rows.prox_logp, rows.behave_logp = torch.zeros(3, 1), torch.zeros(3, 1)
    rows.logp.requires_grad_()
    assert outcome(PNPO(0.5 - 1e-12, 2.0 + 1e-12), rows)[2] == [[True], [False], [False]]
    exact = rows.logp.detach()[1:].exp()
    assert outcome(PNPO(float(exact[0]), float(exact[1])), rows)[2] == [[True], [False], [False]]


def test_pnpo_is_to_behave() -> None:
    # r = 1.1 and w = 1.5: the ratio to behave is 1.65. On fresh rows behave is prox.
    for fresh, ratio in ((False, 1.65), (True, 1.1)):
        rows = token_rows([[1.1, 1.1]], [[1.0, 1.0]], [[1.5, 1.5]], fresh)
        close(outcome(PNPO(), rows)[1], [[-ratio, -ratio]])


def test_prefix_weight_by_hand() -> None:
    # prox / behave 4, 1/4, 8 gives 4, 1, 2, capped at 3.
    rows = token_rows([[1.0, 1.0, 1.0]], [[1.0]], [[4.0, 0.25, 8.0]])
    weight, raw = PrefixIS(cap=3.0)(rows)
    close(weight, [[3.0, 1.0, 2.0]])
    close(raw, [[4.0, 0.25, 8.0]])
    close(PrefixIS(cap=None)(rows)[0], [[4.0, 1.0, 2.0]])
    rows.fresh = torch.ones_like(rows.fresh)
    close(PrefixIS()(rows)[0], [[1.0, 1.0, 1.0]])
    close(PrefixIS(correct_fresh=True)(rows)[0], [[4.0, 1.0, 2.0]])
    rows.logp.requires_grad_()
    rows.prox_logp = rows.logp
    assert not PrefixIS(correct_fresh=True)(rows)[0].requires_grad


def test_prefix_weight_of_one_token_is_every_other_one() -> None:
    rows = random_rows(rows=20, tokens=1)
    for one, other in ((PrefixIS(None), TruncatedIS(None)), (PrefixIS(None), SequenceIS(cap=None))):
        close(one(rows)[0], other(rows)[0])
    prox, behave = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
    of_response = SequenceIS(cap=None)(stale_rows(prox, behave, torch.ones(1, 2, dtype=torch.bool)))[0]
    of_prefix = PrefixIS(None)(stale_rows(prox, behave, torch.ones(1, 2, dtype=torch.bool)))[0]
    close(of_prefix, [[1.0, float(of_response[0, 1])]])


def test_pnpo_without_bounds_is_the_weighted_score() -> None:
    rows = random_rows()
    loss, gradient = loss_and_gradient(Objective(NoCorrection(), PNPO(0.0, math.inf)), rows)
    weight = prefix_ratio(rows.logp.detach(), sampled_logp(rows), rows.mask)
    exact = -(weight * rows.advantages * torch.where(rows.mask, rows.logp, 0.0))[rows.mask].sum() / rows.mask.sum()
    close(loss, exact.detach())
    close(gradient, torch.autograd.grad(exact, rows.logp)[0])
