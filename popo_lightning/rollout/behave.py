"""Replaces the engine's behave log-probs of sampled responses by the trainer's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from popo_lightning.core.groups import Group


def scored_by_trainer(
    groups: Sequence[Group], logprobs: Sequence[Sequence[Tensor]]
) -> tuple[list[Group], dict[str, float]]:
    """Replaces the groups' behave log-probs by the policy's own, and measures how far the engine's were from them.

    Args:
        groups: Groups just sampled with the policy's present weights.
        logprobs: (T,) log-probs under the policy, of each response of each group.

    Returns:
        The groups, and counts for the report: gap_tokens (number of tokens), gap (sum of their absolute differences in
        nats) and gap_max.
    """
    gaps = [torch.zeros(0)]
    scored = []
    for group, of_group in zip(groups, logprobs, strict=True):
        responses = []
        for response, own in zip(group.responses, of_group, strict=True):
            gaps.append((own - response.behave_logp).abs())
            responses.append(replace(response, behave_logp=own))
        scored.append(replace(group, responses=responses))
    distance = torch.cat(gaps).double()
    largest = float(distance.max()) if len(distance) else 0.0
    return scored, {"gap_tokens": len(distance), "gap": float(distance.sum()), "gap_max": largest}
