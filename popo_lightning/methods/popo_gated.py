"""POPO with a test of each stored group against the present policy. A rule of this project."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from popo_lightning.core.bounds import within
from popo_lightning.core.groups import Group
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.metrics.estimates import effective_sample_size
from popo_lightning.objectives.inputs import LOG_RATIO_BOUND
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Iteration


class GatedReplay(PrioritizedGroupReplay):
    """POPO with an admission test: replays a stored group only while its effective sample size is large enough.

    Source: none. POPO (2606.01281) bounds off-policy data by age alone, but how far a policy moves in one version
    depends on the learning rate. The test bounds the effective sample size instead, which measures the harm.

    Formula: with w = prox / behave of a group's N tokens, ESS = (sum w)^2 / (N sum w^2). Groups with an ESS below
    ``min_ess`` stay in the buffer unused. The newest of the others are replayed, as in POPO. Places that no group may
    fill stay empty, so the rule becomes the filter at a high learning rate and POPO at a low one.

    Stored: what POPO stores. Extra passes: one forward pass over the stored groups of an allowed age (phase "rescore"),
        in iterations with a place to fill.

    Args:
        buffer: Replay buffer of effective groups.
        min_ess: Minimum effective sample size per token, from 0 (POPO) to 1 (only groups whose weights are all equal).
    """

    def __init__(self, buffer: GroupReplayBuffer, min_ess: float = 0.9) -> None:
        super().__init__(buffer)
        self.min_ess = within("data.composer.min_ess", min_ess, 0, 1, "0.9")

    def candidates(self, places: int, iteration: Iteration) -> Iterable[Group]:
        """Returns the stored groups that pass the test, the newest first."""
        return still_worth(list(super().candidates(places, iteration)), self.min_ess, iteration) if places else []


def still_worth(groups: list[Group], min_ess: float, iteration: Iteration) -> list[Group]:
    """Returns the groups whose weights under the present policy have an ESS of at least ``min_ess`` per token."""
    admitted = []
    for group, present in zip(groups, iteration.logprobs(groups), strict=True):
        behave = torch.cat([response.behave_logp for response in group.responses])
        weights = (torch.cat(present) - behave).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        if effective_sample_size(weights) >= min_ess:
            admitted.append(group)
    return admitted
