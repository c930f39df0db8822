"""Objectives against numbers worked out by hand and against identities (no fixtures: test_mutations.py calls these)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from popo_lightning.errors import SettingError
from popo_lightning.objectives import (
    KL,
    Decoupled,
    EntropyBonus,
    GroupNormalised,
    Objective,
    ObjectiveInputs,
    One,
    PPOClip,
    decoupled_weight,
    entropy_bonus,
    group_normalised,
    kl_estimate,
    kl_loss,
    log_ratio,
    ppo_clip,
)
from popo_lightning.objectives.regularizers import Estimator

LOG2 = math.log(2.0)


def close(actual: Tensor, expected: object, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    expected = expected if isinstance(expected, Tensor) else torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def random_rows(rows: int = 6, tokens: int = 5, seed: int = 0) -> ObjectiveInputs:
    """Stale float64 data with uneven lengths, large enough steps to clip, and every second row fresh."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prox = -normal(rows, tokens).abs()
    lengths = torch.arange(rows) % tokens + 1
    return ObjectiveInputs(
        logp=(prox + 0.5 * normal(rows, tokens)).requires_grad_(),
        prox_logp=prox,
        behave_logp=prox + 0.7 * normal(rows, tokens),
        advantages=normal(rows, 1),
        mask=torch.arange(tokens) < lengths[:, None],
        fresh=torch.arange(rows) % 2 == 0,
        entropy=normal(rows, tokens).abs().requires_grad_(),
        ref_logp=prox + 0.3 * normal(rows, tokens),
    )


def loss_and_gradient(
    objective: Objective, rows: ObjectiveInputs, denominator: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    loss, _ = objective(rows, rows.mask.sum() if denominator is None else denominator)
    (gradient,) = torch.autograd.grad(loss, rows.logp)
    return loss.detach(), gradient


def full_objective() -> Objective:
    return Objective(Decoupled(), PPOClip(), [EntropyBonus(0.01), KL(0.1, "k3")])


# ---------------------------------------------------------------- advantages


def test_group_normalised_by_hand() -> None:
    # Mean 1/4; squared deviations 9/16 + 3/16 = 3/4; unbiased variance 3/4 / 3 = 1/4, std 1/2 (biased: 0.433).
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 4.0]])
    # Second row: mean 2, squared deviations 16, variance 16/3.
    second = 2 / math.sqrt(16 / 3)
    close(
        group_normalised(rewards), [[1.5, -0.5, -0.5, -0.5], [-second, second, -second, second]], rtol=1e-5, atol=1e-5
    )
    # A large eps shows where it stands: 0.75 / (0.5 + 0.5).
    close(group_normalised(rewards[:1], eps=0.5), [[0.75, -0.25, -0.25, -0.25]])
    close(GroupNormalised(normalise_by_std=False)(rewards), [[0.75, -0.25, -0.25, -0.25], [-2.0, 2.0, -2.0, 2.0]])
    close(GroupNormalised()(rewards), group_normalised(rewards))


def test_equal_rewards_give_exactly_zero() -> None:
    # In float32 seven times 0.1 has a std of about 7e-9, not 0; a spread of 1e-6 counts as none, 1e-3 as some.
    for size in (2, 7, 8, 24):
        rewards = torch.full((1, size), 0.1)
        rewards[0, 0] += 2e-7
        for normalise in (True, False):
            assert torch.equal(group_normalised(rewards, normalise_by_std=normalise), torch.zeros(1, size))
    assert group_normalised(torch.tensor([[0.1, 0.101]])).abs().min() > 0.5


def test_group_of_one_is_refused() -> None:
    with pytest.raises(SettingError, match="at least 2"):
        group_normalised(torch.ones(3, 1))


# ---------------------------------------------------------------- behaviour weights


def test_log_ratio_clamps_and_clears_padding() -> None:
    a = torch.tensor([[1.0, 50.0, -50.0, math.nan, math.inf]])
    b = torch.tensor([[0.5, 0.0, 0.0, 0.0, math.inf]])
    close(log_ratio(a, b, torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])), [[0.5, 20.0, -20.0, 0.0, 0.0]])


def test_decoupled_weight_by_hand() -> None:
    prox = torch.tensor([[LOG2, -LOG2, math.log(8.0), 3.0]])
    behave = torch.zeros(1, 4)
    mask = torch.tensor([[True, True, True, False]])
    weight, raw = decoupled_weight(prox, behave, mask, cap=5.0)
    close(weight, [[2.0, 0.5, 5.0, 1.0]])
    close(raw, [[2.0, 0.5, 8.0, 1.0]])
    # Without a cap the correction is still there.
    close(decoupled_weight(prox, behave, mask)[0], [[2.0, 0.5, 8.0, 1.0]])
    close(Decoupled(cap=None)(prox, behave, torch.tensor([False]), mask)[0], [[2.0, 0.5, 8.0, 1.0]])


def test_fresh_rows_have_weight_one_and_keep_raw() -> None:
    prox, behave, mask = torch.full((2, 2), LOG2), torch.zeros(2, 2), torch.ones(2, 2)
    fresh = torch.tensor([True, False])
    weight, raw = Decoupled()(prox, behave, fresh, mask)
    close(weight, [[1.0, 1.0], [2.0, 2.0]])
    close(raw, [[2.0, 2.0], [2.0, 2.0]])
    close(Decoupled(correct_fresh=True)(prox, behave, fresh, mask)[0], [[2.0, 2.0], [2.0, 2.0]])
    weight, raw = One()(prox, behave, fresh, mask)
    close(weight, [[1.0, 1.0], [1.0, 1.0]])
    close(raw, [[2.0, 2.0], [2.0, 2.0]])


def test_no_gradient_through_the_weight() -> None:
    rows = random_rows()
    rows.prox_logp.requires_grad_()
    rows.behave_logp.requires_grad_()
    for output in decoupled_weight(rows.prox_logp, rows.behave_logp, rows.mask):
        assert not output.requires_grad
    loss, _ = Objective()(rows, 1.0)
    loss.backward()
    assert rows.logp.grad is not None
    assert rows.prox_logp.grad is None
    assert rows.behave_logp.grad is None


# ---------------------------------------------------------------- trust region

# (ratio, advantage, dual clip, loss, gradient of the loss by logp, clipped), with bounds 0.8 and 1.28.
# The gradient of -r A by logp is -r A itself, as d r / d logp = r.
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
    (20.0, 1.0, 10.0, -1.28, 0.0, True),  # the dual clip leaves A > 0 alone
    (3.0, -1.0, 2.0, 2.0, 0.0, True),
    (3.0, 0.0, 2.0, 0.0, 0.0, False),
]


def test_ppo_clip_by_hand() -> None:
    for ratio, advantage, dual, loss, gradient, clipped in PPO_CASES:
        logp = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
        advantages, mask = torch.tensor([[advantage]]), torch.ones(1, 1)
        output = PPOClip(0.2, 0.28, dual)(logp, torch.tensor([[-1.0]]), advantages, mask)
        output.loss.sum().backward()
        close(output.loss.detach(), [[loss]], rtol=2e-6)
        close(output.ratio.detach(), [[ratio]], rtol=2e-6)
        assert logp.grad is not None
        close(logp.grad, [[gradient]], rtol=2e-6)
        assert output.clipped.item() is clipped, (ratio, advantage, dual)


def test_trust_region_at_padding() -> None:
    poison = torch.tensor([[0.0, math.nan, -math.inf, 1e30]])
    output = ppo_clip(poison, -poison, poison, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 0.2, 0.28, 10.0)
    close(output.loss, [[0.0, 0.0, 0.0, 0.0]])
    close(output.ratio, [[1.0, 1.0, 1.0, 1.0]])
    assert not output.clipped.any()


def test_policy_at_prox_is_plain_policy_gradient() -> None:
    # Zero learning rate: r = 1, nothing clipped, loss -w A and gradient -w A; logp may stand in for prox itself.
    rows = random_rows()
    for prox in (rows.logp, rows.logp.detach().clone()):
        rows.prox_logp = prox
        loss, statistics = Objective()(rows, 1.0)
        assert torch.equal(statistics.ratio, torch.ones_like(prox))
        assert statistics.clipped.sum() == 0
        expected = -(statistics.weight * rows.advantages)[rows.mask]
        close(loss.detach(), expected.sum())
        close(torch.autograd.grad(loss, rows.logp)[0][rows.mask], expected)


# ---------------------------------------------------------------- regularizers


def test_kl_estimates_by_hand() -> None:
    # d = 2: k1 = -log 2, k2 = (log 2)^2 / 2, k3 = 2 - 1 - log 2. By logp (d log d = -1): 1, -log 2, -2 + 1.
    expected: dict[Estimator, tuple[float, float]] = {
        "k1": (-LOG2, 1.0),
        "k2": (LOG2**2 / 2, -LOG2),
        "k3": (1 - LOG2, -1.0),
    }
    reference, mask = torch.tensor([[LOG2 - 1, math.nan]]), torch.tensor([[1, 0]])
    for estimator, (value, gradient) in expected.items():
        logp = torch.tensor([[-1.0, math.nan]], requires_grad=True)
        estimate = kl_estimate(logp, reference, estimator, mask)
        estimate.sum().backward()
        close(estimate.detach(), [[value, 0.0]])
        assert logp.grad is not None
        close(logp.grad, [[gradient, 0.0]])
    # log d = 5: e^5 - 1 - 5 = 142, held at 10.
    close(kl_estimate(torch.zeros(1, 1), torch.full((1, 1), 5.0), "k3", torch.ones(1, 1)), [[10.0]])


def test_kl_is_a_mean_over_the_policy() -> None:
    # Exact expectation over a two-letter alphabet: k1 and k3 give KL, k2's gradient is KL's gradient by the logit.
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    logp = torch.nn.functional.logsigmoid(torch.stack([logit, -logit]))[None]
    reference, mask = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log(), torch.ones(1, 2)
    exact = (logp.exp() * (logp - reference)).sum()
    (slope,) = torch.autograd.grad(exact, logit, retain_graph=True)
    probabilities = logp.exp().detach()
    values: list[Estimator] = ["k1", "k3"]
    losses: list[Estimator] = ["k1", "k2"]
    for estimator in values:
        close((probabilities * kl_estimate(logp, reference, estimator, mask)).sum().detach(), exact.detach())
    for estimator in losses:
        loss = (probabilities * kl_loss(logp, reference, estimator, mask)).sum()
        close(torch.autograd.grad(loss, logit, retain_graph=True)[0], slope)
    # Tokens sampled by another policy need the weight: the mean over it of pi / behave * KL is the same.
    behave = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    corrected = kl_loss(logp, reference, "k1", mask, weight=probabilities / behave)
    close((behave * corrected).sum().detach(), exact.detach())


def test_kl_and_entropy_terms_by_hand() -> None:
    mask = torch.tensor([[1, 1, 0]])
    logp = torch.zeros(1, 3, requires_grad=True)
    reference = torch.tensor([[LOG2, 0.0, math.inf]])
    weight = torch.tensor([[3.0, 1.0, 1.0]])
    cases: list[tuple[Estimator, float]] = [("k1", -LOG2), ("k2", LOG2**2 / 2)]
    for estimator, value in cases:
        loss = KL(0.5, estimator)(logp, reference, None, mask, weight)
        close(loss.detach(), [[1.5 * value, 0.0, 0.0]])
        close(torch.autograd.grad(loss.sum(), logp)[0], [[-1.5 * LOG2, 0.0, 0.0]])
    entropy = torch.tensor([[2.0, 1.0, math.nan]], requires_grad=True)
    loss = EntropyBonus(0.1)(logp, None, entropy, mask, weight)
    close(loss.detach(), [[-0.2, -0.1, 0.0]])
    close(torch.autograd.grad(loss.sum(), entropy)[0], [[-0.1, -0.1, 0.0]])
    close(entropy_bonus(entropy, mask).detach(), [[-2.0, -1.0, 0.0]])


# ---------------------------------------------------------------- the whole objective


def by_hand() -> ObjectiveInputs:
    """A fresh row of three tokens with r = 1, A = 2, and a replayed row of two with r = 1.5, 0.5, w = 2, 0.5, A = -1.

    Losses: -2, -2, -2, and 2 * max(1.5, 1.28) = 3, 0.5 * max(0.5, 0.8) = 0.4. Sum -2.6, five tokens: -0.52.
    The mean of the rows' means would be (-2 + 1.7) / 2 = -0.15.
    """
    prox = torch.full((2, 3), -1.0)
    ratio = torch.tensor([[1.0, 1.0, 1.0], [1.5, 0.5, 1.0]])
    weight = torch.tensor([[1.1, 0.9, 1.0], [2.0, 0.5, 1.0]])
    return ObjectiveInputs(
        logp=(prox + ratio.log()).requires_grad_(),
        prox_logp=prox,
        behave_logp=prox - weight.log(),
        advantages=torch.tensor([[2.0], [-1.0]]),
        mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        fresh=torch.tensor([True, False]),
        entropy=torch.full((2, 3), 0.5, requires_grad=True),
        ref_logp=prox + LOG2,
    )


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
    close(Objective(One())(rows, torch.tensor(5))[0].detach(), -0.74)


def test_objective_with_regularizers_by_hand() -> None:
    rows = by_hand()
    # Entropy: five tokens * -0.1 * 0.5 = -0.25. KL k2 with coefficient 1, log d = log 2 - log r, times w.
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


def test_prox_at_behave_is_plain_ppo() -> None:
    rows = random_rows()
    rows.prox_logp = rows.behave_logp
    loss, gradient = loss_and_gradient(Objective(Decoupled(correct_fresh=True)), rows)
    plain = ppo_clip(rows.logp, rows.behave_logp, rows.advantages, rows.mask, 0.2, 0.28, 10.0).loss
    plain_loss = plain.sum() / rows.mask.sum()
    close(loss, plain_loss.detach())
    close(gradient, torch.autograd.grad(plain_loss, rows.logp)[0])


def test_weight_matters_on_stale_rows_and_not_on_fresh_ones() -> None:
    rows = random_rows()
    (decoupled, slope), (one, slope_one) = (loss_and_gradient(Objective(w), rows) for w in (Decoupled(), One()))
    assert (decoupled - one).abs() > 1e-2
    assert (slope - slope_one).abs().max() > 1e-2
    rows.fresh = torch.ones_like(rows.fresh)
    (decoupled, slope), (one, slope_one) = (loss_and_gradient(Objective(w), rows) for w in (Decoupled(), One()))
    assert torch.equal(decoupled, one)
    assert torch.equal(slope, slope_one)


def test_clip_around_behave_with_scaled_width() -> None:
    # w min(r A, clamp(r, 1 -+ e) A) = min(rho A, clamp(rho, w -+ w e) A), rho = r w; and with e/w for e, ReMix's
    # min(rho A, clamp(rho, w -+ e) A) of arXiv 2507.06892.
    rows = random_rows()
    weight, _ = decoupled_weight(rows.prox_logp, rows.behave_logp, rows.mask)
    rho = log_ratio(rows.logp, rows.behave_logp, rows.mask).exp()
    eps = 0.2

    def clipped_at(low: Tensor, high: Tensor) -> Tensor:
        return -torch.minimum(rho * rows.advantages, rho.clamp(low, high) * rows.advantages)

    ours = weight * ppo_clip(rows.logp, rows.prox_logp, rows.advantages, rows.mask, eps, eps).loss
    close(ours[rows.mask], clipped_at(weight * (1 - eps), weight * (1 + eps))[rows.mask])
    remix = clipped_at(weight - eps, weight + eps)
    for row, token in rows.mask.nonzero().tolist():
        part = (slice(row, row + 1), slice(token, token + 1))
        width = eps / weight[part].item()
        advantage = rows.advantages[row : row + 1]
        loss = ppo_clip(rows.logp[part], rows.prox_logp[part], advantage, rows.mask[part], width, width).loss
        close(weight[part] * loss, remix[part])


def test_more_padding_changes_nothing() -> None:
    rows = random_rows()
    loss, gradient = loss_and_gradient(full_objective(), rows)
    poison = torch.tensor([math.nan, -math.inf, math.inf, 1e30, -1e30], dtype=torch.float64)
    padded = random_rows()
    for name in ("logp", "prox_logp", "behave_logp", "entropy", "ref_logp"):
        value = getattr(padded, name).detach()
        # Padding inside the old width is poisoned as well.
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
        micro = ObjectiveInputs(**{k: v[part].detach() for k, v in vars(rows).items()})
        micro.logp.requires_grad_()
        part_loss, part_slope = loss_and_gradient(full_objective(), micro, tokens)
        total += part_loss
        slopes.append(part_slope)
    close(total, loss, rtol=1e-12, atol=1e-12)
    close(torch.cat(slopes), gradient, rtol=1e-12, atol=1e-12)


def test_a_step_raises_good_tokens_and_lowers_bad_ones() -> None:
    rows = random_rows()
    rows.prox_logp = rows.logp.detach()
    _, gradient = loss_and_gradient(Objective(), rows)
    assert torch.equal((-gradient).sign()[rows.mask], rows.advantages.sign().expand_as(gradient)[rows.mask])


# ---------------------------------------------------------------- settings


def test_bad_settings_are_one_sentence() -> None:
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: GroupNormalised(eps=-1.0), "GroupNormalised.eps is -1.0"),
        (lambda: Decoupled(cap=0.5), "Decoupled.cap is 0.5"),
        (lambda: Decoupled(cap=math.nan), "Decoupled.cap is nan"),
        (lambda: PPOClip(clip_low=0.0), "PPOClip.clip_low is 0.0"),
        (lambda: PPOClip(clip_high=-0.1), "PPOClip.clip_high is -0.1"),
        (lambda: PPOClip(dual_clip=1.0), "PPOClip.dual_clip is 1.0"),
        (lambda: EntropyBonus(-0.1), "EntropyBonus.coefficient is -0.1"),
        (lambda: KL(math.inf), "KL.coefficient is inf"),
        (lambda: KL(0.1, "k4"), "KL.estimator is 'k4'"),  # type: ignore[arg-type]
    ]
    for build, message in bad:
        with pytest.raises(SettingError) as caught:
            build()
        assert message in str(caught.value) and str(caught.value).endswith(".")
