"""Rows made by hand and at random for the tests of objectives. test_mutations.py imports this file anew each time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from popo_lightning.objectives.inputs import MinibatchTokens, ObjectiveInputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import KL, EntropyBonus
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion
from popo_lightning.objectives.weights import TruncatedIS

LOG2 = math.log(2.0)


def close(actual: Tensor, expected: object, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    expected = expected if isinstance(expected, Tensor) else torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def random_rows(rows: int = 6, tokens: int = 5, seed: int = 0) -> ObjectiveInputs:
    """Returns stale float64 rows of uneven lengths, with steps large enough to clip. Every second row is fresh."""
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


def stale_rows(prox: Tensor, behave: Tensor, mask: Tensor) -> ObjectiveInputs:
    """Returns replayed rows for tests in which only the importance weight matters."""
    fresh = torch.zeros(len(prox), dtype=torch.bool)
    return ObjectiveInputs(prox, prox, behave, torch.zeros(len(prox), 1), mask, fresh)


def token_rows(
    ratio: list[list[float]],
    advantages: list[list[float]],
    weight: list[list[float]] | None = None,
    fresh: bool = False,
) -> ObjectiveInputs:
    """Returns float64 rows with pi_policy / pi_prox = ratio and pi_prox / pi_behave = weight. NaN is padding."""
    ratios = torch.tensor(ratio, dtype=torch.float64)
    prox = torch.linspace(-2.0, -0.5, ratios.numel(), dtype=torch.float64).view_as(ratios)
    weights = torch.ones_like(ratios) if weight is None else torch.tensor(weight, dtype=torch.float64)
    return ObjectiveInputs(
        logp=(prox + ratios.log()).requires_grad_(),
        prox_logp=prox,
        behave_logp=prox - weights.log(),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        mask=~ratios.isnan(),
        fresh=torch.full((len(ratios),), fresh),
    )


def tokens_of(rows: ObjectiveInputs) -> MinibatchTokens:
    """Returns all response tokens of the rows in one dimension."""
    shape = rows.logp.shape
    values = rows.logp.detach(), rows.prox_logp, rows.behave_logp, rows.advantages.expand(shape)
    return MinibatchTokens(*(v[rows.mask] for v in values), rows.fresh[:, None].expand(shape)[rows.mask])


def outcome(
    region: TrustRegion, rows: ObjectiveInputs, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, list[list[bool]]]:
    """Returns the loss per token, its gradient with respect to logp, and which tokens are clipped."""
    output = region.for_minibatch(tokens_of(rows))(rows, torch.ones_like(rows.prox_logp) if weight is None else weight)
    (gradient,) = torch.autograd.grad(output.loss.sum(), rows.logp)
    return output.loss.detach(), gradient, output.clipped.tolist()


def part_of(rows: ObjectiveInputs, part: slice) -> ObjectiveInputs:
    """Returns some of the rows with their own graph."""
    found = {k: v[part].detach() if isinstance(v, Tensor) else v for k, v in vars(rows).items()}
    found["logp"].requires_grad_()
    return ObjectiveInputs(**found)


def loss_and_gradient(
    objective: Objective, rows: ObjectiveInputs, denominator: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    loss, _ = objective(rows, rows.mask.sum() if denominator is None else denominator)
    (gradient,) = torch.autograd.grad(loss, rows.logp)
    return loss.detach(), gradient


def full_objective() -> Objective:
    return Objective(TruncatedIS(), PPOClip(), [EntropyBonus(0.01), KL(0.1, "k3")])


def by_hand() -> ObjectiveInputs:
    """Returns a fresh row of 3 tokens (r = 1, A = 2) and a replayed row of 2 (r = 1.5, 0.5, w = 2, 0.5, A = -1).

    The losses are -2, -2, -2, and 2 * max(1.5, 1.28) = 3, 0.5 * max(0.5, 0.8) = 0.4. Their sum over the five tokens is
    -2.6, the mean -0.52. The mean of the rows' means would be (-2 + 1.7) / 2 = -0.15.
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
