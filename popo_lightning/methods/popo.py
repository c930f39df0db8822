"""POPO (arXiv 2606.01281): the most recent stored effective groups replace ineffective ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from popo_lightning.core.groups import Group
from popo_lightning.replay.buffer import GroupReplayBuffer, resharded
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.continuations import checked_share, fresh_continuations


class PrioritizedGroupReplay(Composer):
    """POPO (2606.01281): replaces each ineffective group by the most recent stored effective group.

    Selection precedes insertion, so an iteration's own groups cannot fill its own places; they would be copies with
    weight 1. A buffer with too few groups is a normal state: places that cannot be filled stay empty, and the loss
    divides by the tokens of the remaining groups.

    Args:
        buffer: Replay buffer of effective groups.
        fresh_continuations: Continue this share of the replayed responses from a random place, for a critic alone
            (MAD-TD, 2410.08896), such as 0.05; 0 for none. They count in total/responses.
    """

    state = ("buffer",)

    def __init__(self, buffer: GroupReplayBuffer, fresh_continuations: float = 0.0) -> None:
        self.buffer = buffer
        self.fresh_continuations = checked_share("PrioritizedGroupReplay", fresh_continuations)
        self.supports_async = not self.fresh_continuations  # continuations need the present policy

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns effective fresh groups, then replayed ones, up to the number sampled if the buffer has enough."""
        effective, ineffective = iteration.split(iteration.rollout())
        replayed = self.buffer.replay(effective, ineffective, iteration.version, iteration.still_effective)
        return effective + replayed + fresh_continuations(self.fresh_continuations, replayed, iteration)

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """Redistributes all stored groups over the ranks."""
        return resharded(states, ranks)
