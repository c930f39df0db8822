"""Aggregations by hand. Micro-batches add up under each (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.objectives import close, full_objective, loss_and_gradient, part_of, random_rows, token_rows

from popo_lightning.core.errors import SettingError
from popo_lightning.objectives.aggregations import Aggregation, SequenceMean, SequenceSum, TokenMean
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.trust_regions import Unbounded

AGGREGATIONS = (TokenMean(), SequenceMean(), SequenceSum(100.0))


def with_aggregation(aggregation: Aggregation) -> Objective:
    objective = full_objective()
    objective.aggregation = aggregation
    return objective


def test_aggregations_by_hand() -> None:
    # Unbounded losses -r A: a row of three tokens, -1 -2 -6 = -9, and a row of one token, 2.
    rows = token_rows([[1.0, 2.0, 6.0], [2.0, math.nan, math.nan]], [[1.0], [-1.0]])
    lengths = rows.mask.sum(-1)
    # Token mean: -7 / 4. Mean of the means: (-3 + 2) / 2. Mean of the sums over a constant of 10: (-0.9 + 0.2) / 2.
    cases = [(TokenMean(), 4.0, -7 / 4), (SequenceMean(), 2.0, -0.5), (SequenceSum(10.0), 2.0, -0.35)]
    for aggregation, size, value in cases:
        assert aggregation.size(lengths) == size
        loss, gradient = loss_and_gradient(Objective(trust_region=Unbounded(), aggregation=aggregation), rows, size)
        close(loss, value)
        # The gradient of -r A is -r A itself.
        close(gradient.sum(), value)


def test_micro_batches_add_up_in_any_split() -> None:
    rows = random_rows(rows=7)
    rows.loss_weight = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    for aggregation in AGGREGATIONS:
        objective = with_aggregation(aggregation)
        size = aggregation.size(rows.mask.sum(-1))
        loss, gradient = loss_and_gradient(objective, rows, size)
        for ends in ([7], [1, 7], [2, 3, 7], [1, 2, 3, 4, 5, 6, 7]):
            parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
            micro = [part_of(rows, part) for part in parts]
            assert sum(aggregation.size(m.mask.sum(-1)) for m in micro) == size
            found = [loss_and_gradient(objective, m, size) for m in micro]
            close(torch.stack([x for x, _ in found]).sum(), loss, rtol=1e-12, atol=1e-12)
            close(torch.cat([g for _, g in found]), gradient, rtol=1e-12, atol=1e-12)


def test_rows_of_equal_length_make_no_difference() -> None:
    rows = random_rows()
    rows.mask = torch.ones_like(rows.mask)
    losses = []
    for aggregation in (TokenMean(), SequenceMean(), SequenceSum(rows.mask.shape[1])):
        size = aggregation.size(rows.mask.sum(-1))
        losses.append(loss_and_gradient(with_aggregation(aggregation), rows, size)[0])
    close(losses[1], losses[0])
    close(losses[2], losses[0])


def test_a_row_without_tokens_counts_for_nothing() -> None:
    rows = random_rows()
    rows.mask[2] = False
    for aggregation in AGGREGATIONS:
        loss, gradient = loss_and_gradient(with_aggregation(aggregation), rows, 6.0)
        assert loss.isfinite() and gradient.isfinite().all() and gradient[2].abs().max() == 0


def test_loss_weight_leaves_regularizers_alone() -> None:
    rows = random_rows()
    whole, _ = loss_and_gradient(full_objective(), rows)
    plain, _ = loss_and_gradient(Objective(), rows)
    for factor in (0.0, 2.0):
        rows.loss_weight = torch.full((6,), factor, dtype=torch.float64)
        close(loss_and_gradient(full_objective(), rows)[0], whole + (factor - 1) * plain)
    # Weights are by row: only the second row's tokens count twice.
    rows.loss_weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    second, _ = loss_and_gradient(Objective(), part_of(random_rows(), slice(1, 2)), rows.mask.sum())
    close(loss_and_gradient(Objective(), rows)[0], plain + second)


def test_a_length_that_cannot_be_is_refused() -> None:
    for length in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SettingError, match=r"SequenceSum.length is .* such as data.max_new_tokens\."):
            SequenceSum(length)
