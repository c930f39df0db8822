"""The whole objective against numbers by hand and identities (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.objectives import (
    LOG2,
    by_hand,
    close,
    full_objective,
    loss_and_gradient,
    part_of,
    random_rows,
    tokens_of,
)
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.methods.bapo_balanced import BalancedClip
from popo_lightning.objectives.aggregations import SequenceMean
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import KL, EntropyBonus
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegionOutput
from popo_lightning.objectives.weights import MaskedIS, NoCorrection, SmoothedIS, TruncatedIS, decoupled_weight


def test_objective_by_hand() -> None:
    rows = by_hand()
    loss, statistics = Objective()(rows, 5)
    close(loss.detach(), -0.52)
    close(torch.autograd.grad(loss, rows.logp)[0], [[-0.4, -0.4, -0.4], [0.6, 0.0, 0.0]])
    close(statistics.ratio, [[1.0, 1.0, 1.0], [1.5, 0.5, 1.0]])
    close(statistics.weight, [[1.0, 1.0, 1.0], [2.0, 0.5, 1.0]])
    close(statistics.weight_raw, [[1.1, 0.9, 1.0], [2.0, 0.5, 1.0]])
    assert statistics.clipped.tolist() == [[False, False, False], [False, True, False]]
    for name, value in vars(statistics).items():
        assert value.shape == (2, 3) and not value.requires_grad, name
    # w := 1 gives (-6 + 1.5 + 0.8) / 5 on these stale rows.
    close(Objective(NoCorrection())(rows, torch.tensor(5))[0].detach(), -0.74)


def test_objective_with_regularizers_by_hand() -> None:
    rows = by_hand()
    # Entropy: five tokens * -0.1 * 0.5 = -0.25. KL k2 with coefficient 1 has log d = log 2 - log r, times w.
    logs = [LOG2, LOG2, LOG2, LOG2 - math.log(1.5), LOG2 - math.log(0.5)]
    kl = sum(w * 0.5 * x * x for w, x in zip([1, 1, 1, 2, 0.5], logs, strict=True))
    objective = Objective(regularizers=[EntropyBonus(0.1), KL(1.0, "k2")])
    close(objective(rows, 5)[0].detach(), (-2.6 - 0.25 + kl) / 5)
    assert objective.needs_reference and objective.needs_entropy
    assert not Objective().needs_reference and not Objective().needs_entropy
    rows.ref_logp = None
    with pytest.raises(ValueError, match="reference"):
        objective(rows, 5)
    rows.entropy = None
    with pytest.raises(ValueError, match="entropy"):
        objective(rows, 5)


def test_a_rule_that_returns_another_shape_is_named() -> None:
    """A number in place of one per token would be broadcast to all tokens, and train."""

    class Summed(PPOClip):
        def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
            found = super().__call__(rows, weight)
            return TrustRegionOutput(found.loss.sum(), found.ratio, found.clipped)

    class OfRows(NoCorrection):
        def __call__(self, rows: ObjectiveInputs) -> tuple[Tensor, Tensor]:
            return rows.logp[:, 0], rows.logp

    class Mean(KL):
        def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
            return rows.logp.mean()

    rows = by_hand()
    for objective, sentence in (
        (
            Objective(trust_region=Summed()),
            r"model.trust_region is Summed, which returned a loss of shape \(\)",
        ),
        (Objective(behave_weight=OfRows()), r"model.behave_weight is OfRows, which returned a weight of shape"),
        (Objective(regularizers=[Mean(0.1)]), r"model.regularizers is Mean, which returned a loss of shape \(\)"),
    ):
        with pytest.raises(SettingError, match=sentence):
            objective(rows, 1.0)


def test_prox_at_behave_is_plain_ppo() -> None:
    rows = random_rows()
    rows.prox_logp = rows.behave_logp
    loss, gradient = loss_and_gradient(Objective(TruncatedIS(correct_fresh=True)), rows)
    plain = PPOClip(0.2, 0.28, 10.0)(rows, torch.ones_like(rows.logp)).loss
    plain_loss = plain.sum() / rows.mask.sum()
    close(loss, plain_loss.detach())
    close(gradient, torch.autograd.grad(plain_loss, rows.logp)[0])


def test_weight_matters_on_stale_rows_and_not_on_fresh_ones() -> None:
    rows = random_rows()
    (decoupled, slope), (one, slope_one) = (
        loss_and_gradient(Objective(w), rows) for w in (TruncatedIS(), NoCorrection())
    )
    assert (decoupled - one).abs() > 1e-2
    assert (slope - slope_one).abs().max() > 1e-2
    rows.fresh = torch.ones_like(rows.fresh)
    (decoupled, slope), (one, slope_one) = (
        loss_and_gradient(Objective(w), rows) for w in (TruncatedIS(), NoCorrection())
    )
    assert torch.equal(decoupled, one)
    assert torch.equal(slope, slope_one)


def test_decoupled_clip_is_a_clip_around_behave() -> None:
    # w min(r A, clamp(r, 1 -+ e) A) = min(rho A, clamp(rho, w -+ w e) A), rho = r w.
    rows = random_rows()
    weight = decoupled_weight(rows)
    rho = log_ratio(rows.logp, rows.behave_logp, rows.mask).exp()
    exact = -torch.minimum(rho * rows.advantages, rho.clamp(weight * 0.8, weight * 1.2) * rows.advantages)
    ours = weight * PPOClip(0.2, 0.2, None)(rows, weight).loss
    close(ours[rows.mask], exact[rows.mask])


def grpo_by_hand(rows: ObjectiveInputs) -> Tensor:
    """DAPO's objective as published: the mean over tokens of min(r A, clip(r) A), bounded for A < 0 by 10 A."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row, token in rows.mask.nonzero().tolist():
        advantage = rows.advantages[row, 0]
        ratio = (rows.logp[row, token] - rows.prox_logp[row, token]).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        total = total - (torch.maximum(gain, 10 * advantage) if advantage < 0 else gain)
        tokens += 1
    return total / tokens


def test_fresh_popo_is_grpo_with_dapos_clip() -> None:
    rows = random_rows()
    rows.fresh = torch.ones_like(rows.fresh)
    exact = grpo_by_hand(rows)
    for objective in (
        Objective(),
        Objective(NoCorrection()),
        Objective(MaskedIS()),
        Objective(NoCorrection(), BehaveAligned()),
    ):
        loss, gradient = loss_and_gradient(objective, rows)
        close(loss, exact.detach())
        close(gradient, torch.autograd.grad(exact, rows.logp, retain_graph=True)[0])


def test_popo_with_a_weight_of_one_is_pi_old() -> None:
    # On stale rows, each way to set w = 1 is NoCorrection: GRPO's loss if it took replayed rows for fresh ones.
    rows = random_rows()
    loss, gradient = loss_and_gradient(Objective(NoCorrection()), rows)
    close(loss, grpo_by_hand(rows).detach())
    others = random_rows()
    others.behave_logp = others.prox_logp
    for objective, same in (
        (Objective(SmoothedIS(alpha=0.0)), rows),
        (Objective(TruncatedIS(correct_fresh=True)), others),
        (Objective(MaskedIS(correct_fresh=True)), others),
    ):
        found = loss_and_gradient(objective, same)
        assert torch.equal(found[0], loss) and torch.equal(found[1], gradient)


def test_for_minibatch_leaves_the_objective_as_it_is() -> None:
    rows = random_rows()
    objective = Objective(NoCorrection(), BalancedClip(), [EntropyBonus(0.1)], SequenceMean())
    found = objective.for_minibatch(tokens_of(rows))
    assert set(found.report()) == {"clip_low", "clip_high", "positive_share"} and objective.report() == {}
    assert objective.needs_minibatch_tokens and found.aggregation is objective.aggregation
    assert found.regularizers == objective.regularizers and found.behave_weight is objective.behave_weight
    plain = Objective()
    same = loss_and_gradient(plain.for_minibatch(tokens_of(rows)), rows)
    assert all(map(torch.equal, same, loss_and_gradient(plain, rows)))


def test_more_padding_changes_nothing() -> None:
    rows = random_rows()
    loss, gradient = loss_and_gradient(full_objective(), rows)
    poison = torch.tensor([math.nan, -math.inf, math.inf, 1e30, -1e30], dtype=torch.float64)
    padded = random_rows()
    for name in ("logp", "prox_logp", "behave_logp", "entropy", "ref_logp"):
        value = getattr(padded, name).detach()
        # Padding inside the old width is poisoned too.
        value = torch.where(padded.mask, value, poison.roll(len(name)))
        value = torch.cat([value, poison.roll(len(name)).expand(len(value), -1)], dim=1)
        setattr(padded, name, value.requires_grad_(name in ("logp", "entropy")))
    padded.mask = torch.cat([padded.mask, torch.zeros_like(padded.mask)], dim=1)
    padded.advantages = torch.where(padded.mask, padded.advantages, math.nan)
    padded_loss, padded_gradient = loss_and_gradient(full_objective(), padded)
    close(padded_loss, loss, rtol=1e-12, atol=1e-12)
    close(padded_gradient, torch.cat([gradient, torch.zeros_like(gradient)], dim=1), rtol=1e-12, atol=1e-12)
    assert gradient[rows.mask].abs().min() > 0 and padded_gradient.isfinite().all()


def test_micro_batches_add_up() -> None:
    rows = random_rows()
    tokens = rows.mask.sum()
    loss, gradient = loss_and_gradient(full_objective(), rows)
    total, slopes = torch.zeros((), dtype=torch.float64), []
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part_loss, part_slope = loss_and_gradient(full_objective(), part_of(rows, part), tokens)
        total += part_loss
        slopes.append(part_slope)
    close(total, loss, rtol=1e-12, atol=1e-12)
    close(torch.cat(slopes), gradient, rtol=1e-12, atol=1e-12)


def test_a_step_raises_good_tokens_and_lowers_bad_ones() -> None:
    rows = random_rows()
    rows.prox_logp = rows.logp.detach()
    _, gradient = loss_and_gradient(Objective(), rows)
    assert torch.equal((-gradient).sign()[rows.mask], rows.advantages.sign().expand_as(gradient)[rows.mask])
