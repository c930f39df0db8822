"""CISPO, capped importance sampling and REC against numbers by hand (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math

import torch
from helpers.objectives import close, outcome, random_rows, token_rows

from popo_lightning.methods.cispo import CISPO
from popo_lightning.methods.rapid import CappedImportance
from popo_lightning.methods.rec import REC, RECMask
from popo_lightning.objectives.trust_regions import PPOClip, Unbounded

RATIOS = [[0.1, 0.5, 0.9, 1.0, 1.1, 1.5, 8.0]]


def all_of(advantage: float) -> list[list[float]]:
    return [[advantage] * 7]


def test_cispo_by_hand() -> None:
    # The gradient is -clamp(r) A. With bounds 0.8 and 1.5 the ratios count 0.8, 0.8, 0.9, 1, 1.1, 1.5, 1.5.
    for advantage in (2.0, -1.0):
        rows = token_rows(RATIOS, all_of(advantage))
        loss, gradient, clipped = outcome(CISPO(0.2, 0.5), rows)
        close(gradient, [[-advantage * c for c in (0.8, 0.8, 0.9, 1.0, 1.1, 1.5, 1.5)]])
        close(loss, gradient * rows.logp.detach())
        assert clipped == [[True, True, False, False, False, False, True]]
        # There is no lower bound, and the upper one has its default of 5.
        _, gradient, clipped = outcome(CISPO(), rows)
        close(gradient, [[-advantage * c for c in (0.1, 0.5, 0.9, 1.0, 1.1, 1.5, 5.0)]])
        assert clipped == [[False] * 6 + [True]]


def test_cispo_has_ppos_gradient_where_nothing_is_clipped() -> None:
    rows = random_rows()
    _, gradient, clipped = outcome(CISPO(0.2, 0.28), rows)
    _, slope, held = outcome(PPOClip(0.2, 0.28, None), rows)
    free = rows.mask & ~torch.tensor(clipped)
    assert free.sum() > 3 and (rows.mask & ~free).any()
    close(gradient[free], slope[free])
    assert not torch.tensor(held)[free].any()
    # PPO's clipped tokens get no gradient. All tokens of CISPO get one.
    assert slope[torch.tensor(held)].abs().max() == 0 and gradient[rows.mask].abs().min() > 0


def test_capped_importance_by_hand() -> None:
    # rho = r w: 1.5 * 1.2 = 1.8 stays, 1.5 * 4 = 6 counts 2, 0.5 * 0.5 = 0.25 stays.
    rows = token_rows([[1.5, 1.5, 0.5]], [[1.0, 3.0, -1.0]], [[1.2, 4.0, 0.5]])
    loss, gradient, clipped = outcome(CappedImportance(), rows)
    close(gradient, [[-1.8, -6.0, 0.25]])
    close(loss, gradient * rows.logp.detach())
    assert clipped == [[False, True, False]]
    # On fresh rows rho is r. If the cap is not reached the gradient is that of -r A.
    rows.fresh = torch.tensor([True])
    _, gradient, _ = outcome(CappedImportance(), rows)
    close(gradient, outcome(Unbounded(), rows)[1])


KEPT: dict[RECMask, tuple[list[int], list[int]]] = {  # ratios of RATIOS kept for A > 0, for A < 0; bounds 0.8, 1.2
    "none": ([1] * 7, [1] * 7),
    "one-side": ([1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]),
    "two-side": ([0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]),
    # Farther out: A > 0 below 1 - 0.6 = 0.4, A < 0 above 1 + 2 = 3.
    "ring": ([1, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 1]),
}


def test_rec_by_hand() -> None:
    for mask, kept in KEPT.items():
        for advantage, keeps in zip((2.0, -2.0), kept, strict=True):
            rows = token_rows(RATIOS, all_of(advantage))
            loss, gradient, clipped = outcome(REC(mask), rows)
            close(gradient, [[-advantage * k for k in keeps]])
            close(loss, gradient * rows.logp.detach())
            assert clipped == [[not k for k in keeps]], mask
            _, gradient, _ = outcome(REC(mask, weighted=True), rows)
            close(gradient, [[-advantage * k * r for k, r in zip(keeps, RATIOS[0], strict=True)]])


def test_rec_looks_at_the_ratio_to_behave() -> None:
    # r = 1, so a ratio to prox would not be clipped. rho = w = 2 exceeds the one-sided bound for A > 0, and weighs 2.
    rows = token_rows([[1.0, 1.0]], [[1.0, -1.0]], [[2.0, 2.0]])
    assert outcome(REC(), rows)[2] == [[True, False]]
    close(outcome(REC(weighted=True), rows)[1], [[0.0, 2.0]])
    rows.fresh = torch.tensor([True])
    assert outcome(REC(), rows)[2] == [[False, False]]


def test_rec_by_sequence_takes_the_geometric_mean() -> None:
    # First row: sqrt(4 * 1) = 2 (out for A > 0). Second: sqrt(0.25 * 4) = 1. Third: 0.9 alone, beside padding.
    rows = token_rows([[4.0, 1.0], [0.25, 4.0], [0.9, math.nan]], [[1.0], [-1.0], [1.0]])
    _, gradient, clipped = outcome(REC(weighted=True, ratio="sequence"), rows)
    close(gradient, [[0.0, 0.0], [1.0, 1.0], [-0.9, 0.0]])
    assert clipped == [[True, True], [False, False], [False, False]]
    close(outcome(REC(ratio="sequence"), rows)[1], [[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])


def test_rec_one_side_weighted_has_ppos_gradient() -> None:
    rows = random_rows()
    rows.fresh = torch.ones_like(rows.fresh)
    _, gradient, clipped = outcome(REC("one-side", weighted=True, clip_low=0.2, clip_high=0.28), rows)
    _, slope, held = outcome(PPOClip(0.2, 0.28, None), rows)
    assert clipped == held and torch.tensor(clipped).any()
    close(gradient, slope)


def test_no_gradient_through_the_coefficient() -> None:
    # The gradient of -c A log pi by logp is -c A. If c = r had a gradient, it would be -r A (1 + log pi).
    rows = token_rows([[1.1]], [[1.0]])
    for region in (CISPO(), CappedImportance(), REC(weighted=True), REC(weighted=True, ratio="sequence")):
        close(outcome(region, rows)[1], [[-1.1]])
