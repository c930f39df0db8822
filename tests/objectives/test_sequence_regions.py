"""GSPO against numbers by hand and autograd (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math

import torch
from helpers.objectives import close, loss_and_gradient, outcome, random_rows, token_rows

from popo_lightning.methods.gspo import GSPO
from popo_lightning.objectives.aggregations import SequenceMean
from popo_lightning.objectives.inputs import log_ratio
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.trust_regions import PPOClip
from popo_lightning.objectives.weights import NoCorrection


def test_gspo_by_hand() -> None:
    # s = sqrt(4 * 0.25) = 1; sqrt(2.25 * 1) = 1.5; the third row's one token has 0.5. Bounds are 0.8 and 1.2. Second
    # row, A = 1: held at 1.2, no gradient. Third row, A = 1: 0.5 from below, gradient -0.5.
    rows = token_rows([[4.0, 0.25], [2.25, 1.0], [0.5, math.nan]], [[-3.0], [1.0], [1.0]])
    region = GSPO(0.2, 0.2)
    loss, gradient, clipped = outcome(region, rows)
    close(loss, [[3.0, 3.0], [-1.2, -1.2], [-0.5, 0.0]])
    close(gradient, [[3.0, 3.0], [0.0, 0.0], [-0.5, 0.0]])
    assert clipped == [[False, False], [True, True], [False, False]]
    close(region(rows, torch.ones(3, 2)).ratio.detach(), [[1.0, 1.0], [1.5, 1.5], [0.5, 1.0]])
    # With A = -1 the second row is not held. The third is held at 0.8.
    rows.advantages = torch.tensor([[3.0], [-1.0], [-1.0]])
    assert outcome(region, rows)[2] == [[False, False], [False, False], [True, False]]


def test_gspo_is_ppo_for_one_token_answers() -> None:
    rows = random_rows(rows=30, tokens=1)
    for bounds in ((0.2, 0.28), (0.4, 0.05)):
        gspo, slope, clipped = outcome(GSPO(*bounds), rows)
        ppo, expected, held = outcome(PPOClip(*bounds, None), rows)
        close(gspo, ppo)
        close(slope, expected)
        assert clipped == held and torch.tensor(clipped).any() and not torch.tensor(clipped).all()


def test_gspo_has_the_gradient_of_the_papers_objective() -> None:
    # The mean over rows of max(-s A, -clamp(s) A), s = exp(mean log r), is differentiated by autograd.
    rows = random_rows()
    objective = Objective(NoCorrection(), GSPO(0.2, 0.28), aggregation=SequenceMean())
    loss, gradient = loss_and_gradient(objective, rows, len(rows.logp))
    logs = log_ratio(rows.logp, rows.prox_logp, rows.mask).sum(-1) / rows.mask.sum(-1)
    s, advantages = logs.exp(), rows.advantages[:, 0]
    exact = torch.maximum(-s * advantages, -s.clamp(0.8, 1.28) * advantages).mean()
    close(loss, exact.detach())
    close(gradient, torch.autograd.grad(exact, rows.logp)[0])
    assert (gradient[rows.mask] == 0).any() and gradient.abs().max() > 0


def test_gspo_is_cut_at_e_to_the_tenth() -> None:
    # Token log-ratios are 15, so s would be e^15. With A = -1 only this bound holds.
    rows = token_rows([[math.exp(15.0)]], [[-1.0]])
    loss, gradient, _ = outcome(GSPO(), rows)
    close(loss, [[math.exp(10.0)]])
    close(gradient, [[0.0]])


def test_gspo_defaults_are_the_papers() -> None:
    rows = token_rows([[1.00045], [1.00035], [0.99965], [0.99975]], [[1.0], [1.0], [-1.0], [-1.0]])
    assert outcome(GSPO(), rows)[2] == [[True], [False], [True], [False]]
