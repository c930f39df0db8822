"""PPO's clip and no clip against numbers worked out by hand (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.objectives import close, outcome, random_rows, token_rows, tokens_of

from popo_lightning.core.errors import SettingError
from popo_lightning.methods.bapo_balanced import BalancedClip
from popo_lightning.methods.cispo import CISPO
from popo_lightning.methods.freshper import FilteredBehaveAligned
from popo_lightning.methods.gspo import GSPO
from popo_lightning.methods.m2po import M2PO
from popo_lightning.methods.pnpo import PNPO, PrefixIS
from popo_lightning.methods.rapid import CappedImportance
from popo_lightning.methods.rec import REC
from popo_lightning.methods.remix import ScaledWidth
from popo_lightning.methods.sat import SAT
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion, Unbounded
from popo_lightning.objectives.weights import NoCorrection, TruncatedIS

# (ratio, advantage, dual clip, loss, gradient of the loss by logp, clipped), with bounds 0.8 and 1.28. The gradient of
# -r A by logp is -r A itself, because d r / d logp = r.
PPO_CASES: list[tuple[float, float, float | None, float, float, bool]] = [
    (1.0, 1.0, 10.0, -1.0, -1.0, False),
    (1.1, 2.0, 10.0, -2.2, -2.2, False),
    (1.5, 1.0, 10.0, -1.28, 0.0, True),  # max(-1.5, -1.28)
    (1.5, -1.0, 10.0, 1.5, 1.5, False),  # max(1.5, 1.28)
    (0.5, 1.0, 10.0, -0.5, -0.5, False),  # max(-0.5, -0.8)
    (0.5, -1.0, 10.0, 0.8, 0.0, True),  # max(0.5, 0.8)
    (20.0, -1.0, 10.0, 10.0, 0.0, True),  # min(20, 10)
    (20.0, -0.5, 10.0, 5.0, 0.0, True),  # min(10, 5)
    (20.0, -1.0, None, 20.0, 20.0, False),
    (20.0, 1.0, 10.0, -1.28, 0.0, True),  # the dual clip does not affect A > 0
    (3.0, -1.0, 2.0, 2.0, 0.0, True),
    (3.0, 0.0, 2.0, 0.0, 0.0, False),
]


def test_ppo_clip_by_hand() -> None:
    for ratio, advantage, dual, loss, gradient, clipped in PPO_CASES:
        rows = token_rows([[ratio]], [[advantage]])
        output = PPOClip(0.2, 0.28, dual)(rows, torch.ones(1, 1))
        output.loss.sum().backward()
        close(output.loss.detach(), [[loss]], rtol=2e-6)
        close(output.ratio.detach(), [[ratio]], rtol=2e-6)
        assert rows.logp.grad is not None
        close(rows.logp.grad, [[gradient]], rtol=2e-6)
        assert output.clipped.item() is clipped, (ratio, advantage, dual)


def test_trust_region_at_padding() -> None:
    poison = torch.tensor([[0.0, math.nan, -math.inf, 1e30]])
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    rows = ObjectiveInputs(poison, -poison, poison, poison, mask, torch.tensor([False]))
    output = PPOClip(0.2, 0.28, 10.0)(rows, torch.ones(1, 4))
    close(output.loss, [[0.0, 0.0, 0.0, 0.0]])
    close(output.ratio, [[1.0, 1.0, 1.0, 1.0]])
    assert not output.clipped.any()


def test_policy_at_prox_is_plain_policy_gradient() -> None:
    # With learning rate 0, r = 1, nothing is clipped, the loss is -w A and the gradient -w A. prox may be logp itself.
    rows = random_rows()
    for prox in (rows.logp, rows.logp.detach().clone()):
        rows.prox_logp = prox
        loss, statistics = Objective()(rows, 1.0)
        assert torch.equal(statistics.ratio, torch.ones_like(prox))
        assert statistics.clipped.sum() == 0
        expected = -(statistics.weight * rows.advantages)[rows.mask]
        close(loss.detach(), expected.sum())
        close(torch.autograd.grad(loss, rows.logp)[0][rows.mask], expected)


def test_unbounded_by_hand() -> None:
    # The loss and its gradient are -r A, without a bound. Without weight it is -A log pi with gradient -A, for any
    # ratio.
    rows = token_rows([[3.0, 0.1, math.nan], [1.0, 50.0, 2.0]], [[2.0, -1.0, 5.0], [-1.0, -1.0, 1.0]])
    loss, gradient, clipped = outcome(Unbounded(), rows)
    close(loss, [[-6.0, 0.1, 0.0], [1.0, 50.0, -2.0]])
    close(gradient, loss)
    assert not torch.tensor(clipped).any()
    loss, gradient, clipped = outcome(Unbounded(weighted=False), rows)
    close(gradient, [[-2.0, 1.0, 0.0], [1.0, 1.0, -1.0]])
    close(loss[rows.mask], (gradient * rows.logp.detach())[rows.mask])
    assert not torch.tensor(clipped).any()


REGIONS: list[tuple[TrustRegion, bool]] = [  # and whether its ratio is to behave
    (PPOClip(), False),
    (Unbounded(), False),
    (Unbounded(weighted=False), False),
    (BehaveAligned(), True),
    (FilteredBehaveAligned(max_ratio=1.2), True),
    (GSPO(), False),
    (CISPO(0.2, 0.28), False),
    (CappedImportance(), True),
    (REC("one-side"), True),
    (REC("two-side", weighted=True), True),
    (REC("ring", weighted=True, ratio="sequence"), True),
    (M2PO(1e-6, 0.01, 0.01), True),
    (BalancedClip(), False),
    (BalancedClip(center="behave"), True),
    (ScaledWidth(), False),
    (SAT(center="behave"), True),
    (PNPO(), True),
]


def test_padding_holds_anything_in_every_region() -> None:
    poison = torch.tensor([math.nan, -math.inf, math.inf, 1e30, -1e30], dtype=torch.float64)
    for region, _ in REGIONS:
        rows, padded = random_rows(), random_rows()
        for name in ("logp", "prox_logp", "behave_logp"):
            value = torch.where(padded.mask, getattr(padded, name).detach(), poison.roll(len(name)))
            setattr(padded, name, value.requires_grad_(name == "logp"))
        padded.advantages = torch.where(padded.mask, padded.advantages, math.nan)
        weight = torch.where(rows.mask, 1.5, math.nan)
        loss, gradient, clipped = outcome(region, padded, weight)
        expected, slope, held = outcome(region, rows, torch.full_like(weight, 1.5))
        name = type(region).__name__
        assert torch.equal(loss, expected), name
        assert torch.equal(gradient, slope) and gradient[rows.mask].abs().max() > 0, name
        assert torch.equal(loss[~rows.mask], torch.zeros_like(loss[~rows.mask])), name
        assert clipped == held and not torch.tensor(clipped)[~rows.mask].any(), name


def test_without_a_step_every_region_has_the_policy_gradient() -> None:
    # On fresh rows before the first step the ratio is 1 and the gradient -A for every region, including GSPO's.
    for region, _ in REGIONS:
        rows = random_rows()
        rows.prox_logp = rows.logp.detach()
        rows.fresh = torch.ones_like(rows.fresh)
        loss, gradient, clipped = outcome(region, rows)
        close(gradient[rows.mask], -rows.advantages.expand_as(gradient)[rows.mask])
        assert not torch.tensor(clipped).any()
        ratio = region.for_minibatch(tokens_of(rows))(rows, torch.ones_like(loss)).ratio.detach()
        close(ratio, torch.ones_like(ratio), rtol=0, atol=0)


def test_regions_around_behave_move_with_it_and_refuse_a_weight() -> None:
    # On replayed rows, shifting behave affects only these regions, and only these would correct twice.
    for region, around_behave in REGIONS:
        assert region.includes_is_weight == around_behave, type(region).__name__
        rows = random_rows()
        rows.fresh = torch.zeros_like(rows.fresh)
        _, before, _ = outcome(region, rows)
        rows.behave_logp = rows.behave_logp - 1.0
        _, after, _ = outcome(region, rows)
        assert torch.equal(before, after) != around_behave, type(region).__name__
        if around_behave:
            with pytest.raises(SettingError, match=r"model.behave_weight is TruncatedIS.*use NoCorrection"):
                Objective(TruncatedIS(), region)
        Objective(NoCorrection(), region)


def test_fresh_rows_know_no_behave() -> None:
    for region, _ in REGIONS:
        rows = random_rows()
        rows.fresh = torch.ones_like(rows.fresh)
        loss, gradient, _ = outcome(region, rows)
        rows.behave_logp = rows.behave_logp - 1.0
        assert all(map(torch.equal, (loss, gradient), outcome(region, rows)[:2])), type(region).__name__


def test_behave_aligned_by_hand() -> None:
    # rho = r w = 1.1 * 2 = 2.2: A = 1 -> held at 1.28; A = -1 -> 2.2. rho = 1.1 * 0.5 = 0.55: A = -1 -> held at 0.8.
    rows = token_rows([[1.1, 1.1, 1.1]], [[1.0, -1.0, -1.0]], [[2.0, 2.0, 0.5]])
    loss, gradient, clipped = outcome(BehaveAligned(), rows)
    close(loss, [[-1.28, 2.2, 0.8]])
    close(gradient, [[0.0, 2.2, 0.0]])
    assert clipped == [[True, False, True]]
    # Around prox, none of the same tokens is held.
    assert outcome(PPOClip(), rows)[2] == [[False, False, False]]


def test_filter_of_whole_responses_by_hand() -> None:
    # prox / behave 9, 0.9999 has a geometric mean below 3 and is kept. 9, 1.001 are both rejected, and so is 20 with
    # padding. The policy's later steps do not count: r = 5 on the first row, whose ratio to behave of 45 is held at
    # 1.2.
    weights = [[9.0, 0.9999], [9.0, 1.001], [20.0, math.nan]]
    ratios = [[5.0, 1.0], [1.0, 1.0], [1.0, math.nan]]
    rows = token_rows(ratios, [[1.0], [-1.0], [-1.0]], weights)
    loss, gradient, clipped = outcome(FilteredBehaveAligned(0.2, 0.2, None, 3.0), rows)
    close(loss, [[-1.2, -0.9999], [0.0, 0.0], [0.0, 0.0]])
    close(gradient, [[0.0, -0.9999], [0.0, 0.0], [0.0, 0.0]])
    assert clipped == [[True, False], [True, True], [True, False]]
    # In the other direction nothing is rejected: the ratio of responses that the policy has left is small.
    rows = token_rows([[1.0, 1.0]], [[-1.0]], [[1e-3, 1e-3]])
    close(outcome(FilteredBehaveAligned(), rows)[0], [[0.8, 0.8]])


def test_bad_settings_of_regions_are_one_sentence() -> None:
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: PPOClip(clip_low=0.0), "PPOClip.clip_low is 0.0"),
        (lambda: PPOClip(clip_low=2.0), "PPOClip.clip_low is 2.0"),
        (lambda: PPOClip(clip_high=-0.1), "PPOClip.clip_high is -0.1"),
        (lambda: PPOClip(dual_clip=1.0), "PPOClip.dual_clip is 1.0"),
        (lambda: BehaveAligned(clip_low=math.nan), "BehaveAligned.clip_low is nan"),
        (lambda: FilteredBehaveAligned(max_ratio=1.0), "FilteredBehaveAligned.max_ratio is 1.0"),
        (lambda: GSPO(clip_low=0.0), "GSPO.clip_low is 0.0"),
        (lambda: GSPO(clip_high=math.inf), "GSPO.clip_high is inf"),
        (lambda: CISPO(clip_low=0.0), "CISPO.clip_low is 0.0"),
        (lambda: CISPO(clip_high=0.0), "CISPO.clip_high is 0.0"),
        (lambda: CappedImportance(1.0), "CappedImportance.cap is 1.0"),
        (lambda: REC("both"), "REC.mask is 'both'"),  # type: ignore[arg-type]
        (lambda: REC(ratio="row"), "REC.ratio is 'row'"),  # type: ignore[arg-type]
        (lambda: REC(clip_low=1.5), "REC.clip_low is 1.5"),
        (lambda: REC(ring_low=0.1), "REC.ring_low is 0.1"),
        (lambda: REC(ring_high=0.1), "REC.ring_high is 0.1"),
        (lambda: M2PO(budget=0.0), "M2PO.budget is 0.0"),
        (lambda: M2PO(min_clip_low=2.0), "M2PO.min_clip_low is 2.0"),
        (lambda: M2PO(min_clip_high=-1.0), "M2PO.min_clip_high is -1.0"),
        (lambda: BalancedClip(low_from=0.95), "BalancedClip.low_from is 0.95"),
        (lambda: BalancedClip(low_to=1.1), "BalancedClip.low_to is 1.1"),
        (lambda: BalancedClip(high_from=0.9), "BalancedClip.high_from is 0.9"),
        (lambda: BalancedClip(high_to=1.1), "BalancedClip.high_to is 1.1"),
        (lambda: BalancedClip(step=0.0), "BalancedClip.step is 0.0"),
        (lambda: BalancedClip(target=1.5), "BalancedClip.target is 1.5"),
        (lambda: BalancedClip(dual_clip=0.5), "BalancedClip.dual_clip is 0.5"),
        (lambda: BalancedClip(center="ref"), "BalancedClip.center is 'ref'"),  # type: ignore[arg-type]
        (lambda: ScaledWidth(clip=0.0), "ScaledWidth.clip is 0.0"),
        (lambda: ScaledWidth(dual_clip=1.0), "ScaledWidth.dual_clip is 1.0"),
        (lambda: SAT(clip_low=0.0), "SAT.clip_low is 0.0"),
        (lambda: SAT(clip_high=math.nan), "SAT.clip_high is nan"),
        (lambda: SAT(quantile=1.0), "SAT.quantile is 1.0"),
        (lambda: SAT(quantile=0.0), "SAT.quantile is 0.0"),
        (lambda: SAT(exponent=-1.0), "SAT.exponent is -1.0"),
        (lambda: SAT(exponent=math.nan), "SAT.exponent is nan"),
        (lambda: SAT(dual_clip=0.5), "SAT.dual_clip is 0.5"),
        (lambda: SAT(center="ref"), "SAT.center is 'ref'"),  # type: ignore[arg-type]
        (lambda: PNPO(min_ratio=1.5), "PNPO.min_ratio is 1.5"),
        (lambda: PNPO(max_ratio=0.5), "PNPO.max_ratio is 0.5"),
        (lambda: PNPO(max_ratio=math.nan), "PNPO.max_ratio is nan"),
        (lambda: PrefixIS(cap=0.5), "PrefixIS.cap is 0.5"),
    ]
    for build, message in bad:
        with pytest.raises(SettingError) as caught:
            build()
        assert message in str(caught.value) and str(caught.value).endswith(".")


def test_bounds_of_a_minibatch_must_be_asked_for() -> None:
    for region in (M2PO(), BalancedClip(), SAT()):
        assert region.needs_minibatch_tokens and Objective(NoCorrection(), region).needs_minibatch_tokens
        with pytest.raises(RuntimeError, match="for_minibatch"):
            Objective(NoCorrection(), region)(random_rows(), 1.0)
        assert not Objective(NoCorrection(), region).for_minibatch(tokens_of(random_rows())).needs_minibatch_tokens
    assert not Objective().needs_minibatch_tokens
