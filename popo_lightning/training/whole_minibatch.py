"""Prepares an objective that depends on a whole minibatch, by passes without gradient before the first micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch, Row
from popo_lightning.core.ranks import all_gather_tensors
from popo_lightning.model.padded_rows import OF_MINIBATCH, columns_of, flat_tokens, objective_inputs, response_mask
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.objectives.inputs import MinibatchTokens
from popo_lightning.objectives.objective import Objective


def of_whole_minibatch(
    policy: PolicyModel, minibatch: Minibatch, rows: Sequence[Row]
) -> tuple[Objective, Sequence[Row]]:
    """Returns the objective and the rows, adapted to all tokens of the minibatch if needed. May be a collective.

    Args:
        policy: Policy with the weights before the step.
        minibatch: The minibatch.
        rows: Rows of the minibatch on this rank, with their advantages.
    """
    objective = policy.objective
    if objective.needs_minibatch_tokens:
        flat = dict(zip(OF_MINIBATCH, all_gather_tensors(flat_tokens(rows, policy.logprobs(minibatch))), strict=True))
        objective = objective.for_minibatch(MinibatchTokens(**flat | {"fresh": flat["fresh"].bool()}))
    if objective.trust_region.compares_pairs:
        return _with_rivals(objective, policy, minibatch, rows)
    return objective, rows


def _with_rivals(
    objective: Objective, policy: PolicyModel, minibatch: Minibatch, rows: Sequence[Row]
) -> tuple[Objective, Sequence[Row]]:
    """Adds to each row the log-ratio of the other row of its pair, so that the two may be in different passes."""
    sizes = {len(group.responses) for group in minibatch.groups} - {2}
    if sizes:
        raise SettingError(
            f"model.trust_region is {type(policy.objective.trust_region).__name__}, which compares two responses, but "
            f"data.composer gives a group of {sizes.pop()}; use ReplayedPairs"
        )
    moved = bool({"prox_logp", "prox_alpha"} & minibatch.recorded.keys())
    if not (moved or policy.objective.trust_region.needs_reference):  # the policy is prox, so all log-ratios are 0
        return objective, [replace(row, tensors=row.tensors | {"rival": torch.tensor(0.0)}) for row in rows]
    own = _log_ratios(policy, minibatch, rows)
    rivals = own.view(-1, 2).flip(1).flatten()
    signs = torch.stack([row.tensors["advantages"].sign() for row in rows]) if rows else torch.empty(0)
    (margins,) = all_gather_tensors([(signs * own).view(-1, 2).sum(dim=1)])
    with_rivals = [
        replace(row, tensors=row.tensors | {"rival": rival}) for row, rival in zip(rows, rivals, strict=True)
    ]
    return objective.for_pairs(margins), with_rivals


def _log_ratios(policy: PolicyModel, minibatch: Minibatch, rows: Sequence[Row]) -> Tensor:
    """Returns (R,) the log-ratios that the trust region compares, under the weights before the step."""
    logp = policy.logprobs(minibatch)
    first = policy.reference_scores(minibatch) if policy.objective.trust_region.needs_reference else None
    if not rows:
        return torch.empty(0)
    inputs = objective_inputs(
        columns_of(rows),
        response_mask(rows),
        torch.tensor([row.fresh for row in rows]),
        pad_sequence(logp, batch_first=True),
        ref_logp=None if first is None else pad_sequence(first, batch_first=True),
    )
    return policy.objective.trust_region.log_ratios(inputs)[:, 0]
