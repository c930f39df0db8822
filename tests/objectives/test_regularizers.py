"""Regularizers against numbers worked out by hand (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.objectives import LOG2, close, random_rows, stale_rows, token_rows

from popo_lightning.core.errors import SettingError
from popo_lightning.methods.remix import ConvexKL, base_share
from popo_lightning.objectives.regularizers import (
    KL,
    EntropyBonus,
    Estimator,
    SquaredLogRatio,
    entropy_bonus,
    kl_estimate,
    kl_loss,
)


def test_kl_estimates_by_hand() -> None:
    # d = 2: k1 = -log 2, k2 = (log 2)^2 / 2, k3 = 2 - 1 - log 2. Gradients by logp (d log d = -1): 1, -log 2, -2 + 1.
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
    # In exact expectation over a two-letter alphabet, k1 and k3 give KL. k2's gradient is KL's gradient by the logit.
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
    # Tokens sampled by another policy need the weight: the mean of pi / behave * KL over that policy is the same.
    behave = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    corrected = kl_loss(logp, reference, "k1", mask, weight=probabilities / behave)
    close((behave * corrected).sum().detach(), exact.detach())


def test_kl_and_entropy_terms_by_hand() -> None:
    mask = torch.tensor([[1, 1, 0]])
    logp = torch.zeros(1, 3, requires_grad=True)
    reference = torch.tensor([[LOG2, 0.0, math.inf]])
    weight = torch.tensor([[3.0, 1.0, 1.0]])
    rows = stale_rows(logp, logp, mask)
    cases: list[tuple[Estimator, float]] = [("k1", -LOG2), ("k2", LOG2**2 / 2)]
    for estimator, value in cases:
        rows.logp, rows.ref_logp = logp, reference
        loss = KL(0.5, estimator)(rows, weight)
        close(loss.detach(), [[1.5 * value, 0.0, 0.0]])
        close(torch.autograd.grad(loss.sum(), logp)[0], [[-1.5 * LOG2, 0.0, 0.0]])
    entropy = torch.tensor([[2.0, 1.0, math.nan]], requires_grad=True)
    rows.entropy = entropy
    loss = EntropyBonus(0.1)(rows, weight)
    close(loss.detach(), [[-0.2, -0.1, 0.0]])
    close(torch.autograd.grad(loss.sum(), entropy)[0], [[-0.1, -0.1, 0.0]])
    close(entropy_bonus(entropy, mask).detach(), [[-2.0, -1.0, 0.0]])


def test_squared_log_ratio_by_hand() -> None:
    # log r = log 2 and -log 2: the value is c (log 2)^2, the gradient 2 c log r. No weight applies, and padding and r =
    # 1 have none.
    rows = token_rows([[2.0, 0.5, 1.0, math.nan]], [[1.0]], [[3.0, 3.0, 3.0, 3.0]])
    loss = SquaredLogRatio(0.1)(rows, torch.full((1, 4), 3.0))
    close(loss.detach(), [[0.1 * LOG2**2, 0.1 * LOG2**2, 0.0, 0.0]])
    close(torch.autograd.grad(loss.sum(), rows.logp)[0], [[0.2 * LOG2, -0.2 * LOG2, 0.0, 0.0]])
    assert not SquaredLogRatio().needs_reference and SquaredLogRatio().coefficient == 0.1


def test_base_share_by_hand() -> None:
    # It is 1 through iteration 50, 0.9 for 51 to 60, ..., 0.5 from 91 on.
    expected = {0: 1.0, 50: 1.0, 51: 0.9, 60: 0.9, 61: 0.8, 70: 0.8, 80: 0.7, 90: 0.6, 91: 0.5, 100: 0.5, 1000: 0.5}
    assert {version: base_share(version) for version in expected} == pytest.approx(expected)
    assert base_share(3, start=1, interval=2, step=0.25, min_share=0.0) == 0.75


def test_convex_kl_by_hand() -> None:
    # k2 to the reference (log d = log 2 - log r) and to prox (log d = -log r), times the weight 3.
    logs = [math.log(1.5), math.log(0.5)]
    for version, share in ((0, 1.0), (55, 0.9), (500, 0.5)):
        rows = token_rows([[1.5, 0.5, math.nan]], [[1.0]])
        rows.ref_logp = rows.prox_logp + LOG2
        rows.version = version
        loss = ConvexKL(2.0, "k2")(rows, torch.full((1, 3), 3.0))
        expected = [6 * (share * 0.5 * (LOG2 - x) ** 2 + (1 - share) * 0.5 * x**2) for x in logs]
        close(loss.detach(), [[*expected, 0.0]])
        slope = [6 * (share * (x - LOG2) + (1 - share) * x) for x in logs]
        close(torch.autograd.grad(loss.sum(), rows.logp)[0], [[*slope, 0.0]])


def test_convex_kl_is_kl_at_first_and_needs_the_reference() -> None:
    rows = random_rows()
    weight = torch.full_like(rows.prox_logp, 2.0)
    estimators: list[Estimator] = ["k1", "k2", "k3"]
    for estimator in estimators:
        assert torch.equal(ConvexKL(0.1, estimator)(rows, weight), KL(0.1, estimator)(rows, weight))
    assert ConvexKL(0.1).needs_reference
    rows.ref_logp = None
    with pytest.raises(ValueError, match="reference"):
        ConvexKL(0.1)(rows, weight)


def test_bad_settings_of_regularizers_are_one_sentence() -> None:
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: EntropyBonus(-0.1), "EntropyBonus.coefficient is -0.1"),
        (lambda: KL(math.inf), "KL.coefficient is inf"),
        (lambda: KL(0.1, "k4"), "KL.estimator is 'k4'"),  # type: ignore[arg-type]
        (lambda: SquaredLogRatio(-1.0), "SquaredLogRatio.coefficient is -1.0"),
        (lambda: ConvexKL(math.nan), "ConvexKL.coefficient is nan"),
        (lambda: ConvexKL(0.1, "k0"), "ConvexKL.estimator is 'k0'"),  # type: ignore[arg-type]
        (lambda: ConvexKL(0.1, start=-1), "ConvexKL.start is -1"),
        (lambda: ConvexKL(0.1, interval=0), "ConvexKL.interval is 0"),
        (lambda: ConvexKL(0.1, step=0.0), "ConvexKL.step is 0.0"),
        (lambda: ConvexKL(0.1, min_share=1.5), "ConvexKL.min_share is 1.5"),
    ]
    for build, message in bad:
        with pytest.raises(SettingError) as caught:
            build()
        assert message in str(caught.value) and str(caught.value).endswith(".")
