"""Fresh continuations of stored responses, which only a critic learns from (MAD-TD, 2410.08896)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from popo_lightning.core.groups import Group
from popo_lightning.replay.composer import Iteration
from popo_lightning.replay.prefixes import cut_response

PURPOSE = "fresh continuations"


def fresh_continuations(share: float, replayed: Sequence[Group], iteration: Iteration) -> list[Group]:
    """Continues beginnings of replayed responses with the present policy, as graded groups of one for a critic alone.

    The returns of replayed responses belong to the policies that sampled them. A critic that learns from them
    repeatedly drifts away from the present policy's returns. The source therefore takes 5% of each critic batch from
    states of its replay buffer, continued by a learned model under the present actor. Here the engine continues the
    text, and the verifier is exact.

    A response is cut after a random fraction of its tokens. Its beginning becomes part of the prompt, so no value is
    learned on its tokens.

    Args:
        share: Continuations per replayed response. Their number is rounded up or down at random; 0 samples nothing.
        replayed: Stored groups that the iteration trains on.
        iteration: Iteration that samples.
    """
    responses = [
        (group.problem, response) for group in replayed for response in group.responses if len(response.token_ids) > 1
    ]
    if not share or not responses:
        return []
    random = iteration.random(PURPOSE)
    wanted = share * len(responses)
    count = min(len(responses), math.floor(wanted) + (random.random() < wanted % 1))
    chosen = random.sample(responses, count)
    prefixes = [cut_response(response, (0.0, 1.0), random) for _, response in chosen]
    return [replace(group, critic_only=True) for group in iteration.sample([p for p, _ in chosen], 1, prefixes)]
