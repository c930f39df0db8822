"""Estimates the present policy's accuracy on replayed problems from the proximal log-probs that training computes.

It uses self-normalized importance sampling within each replayed group. The buffer keeps groups because their rewards
differ, and this selection pulls the estimate towards one half. Follow its course, but do not report it as an accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.metrics.effective import effective_responses, normalized, too_few, usable

GROUPS, WEIGHTED, SAMPLED, EFFECTIVE, USABLE = (
    f"buffer_{name}" for name in ("groups", "weighted_acc", "sampled_acc", "effective", "usable")
)
SUMS = (GROUPS, WEIGHTED, SAMPLED, EFFECTIVE, USABLE)
"""Names of a minibatch's sums, which are added up over ranks and minibatches."""


def buffer_sums(minibatch: Minibatch) -> dict[str, float]:
    """Sums over the replayed groups of a minibatch; zeros if its prox is not the policy at the iteration's start.

    Args:
        minibatch: Minibatch, with or without proximal log-probs.
    """
    sums = dict.fromkeys(SUMS, 0.0)
    if "prox_logp" not in minibatch.recorded or not minibatch.prox_is_start:
        return sums
    prox = iter(minibatch.recorded["prox_logp"])
    for group in minibatch.groups:
        changes = [next(prox) - response.behave_logp for response in group.responses]
        if group.version >= minibatch.version:
            continue
        log_weights = np.array([float(change.double().sum()) for change in changes])
        accuracy, effective = group.rewards("acc").double().numpy(), effective_responses(log_weights)
        found = (1.0, float(normalized(log_weights) @ accuracy), float(accuracy.mean()), effective)
        for name, value in zip(SUMS, (*found, float(usable(log_weights))), strict=True):
            sums[name] += value
    return sums


def buffer_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns an iteration's `estimate/*`, without the accuracy if more than half of the groups are not usable.

    Args:
        steps: Sums of each minibatch.
    """
    sums = {name: sum(step.get(name, 0.0) for step in steps) for name in SUMS}
    if not sums[GROUPS]:
        return {}
    found = {
        "estimate/buffer_sampled_acc": sums[SAMPLED] / sums[GROUPS],
        "estimate/buffer_effective": sums[EFFECTIVE] / sums[GROUPS],
        "estimate/buffer_groups": sums[GROUPS],
    }
    if not too_few(round(sums[USABLE]), round(sums[GROUPS])):
        found["estimate/buffer_acc"] = sums[WEIGHTED] / sums[GROUPS]
    return found
