"""POPO (arXiv 2606.01281): the most recent stored effective groups replace ineffective ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from popo_lightning.core.bounds import within
from popo_lightning.core.groups import Group
from popo_lightning.replay.buffer import GroupReplayBuffer, resharded
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.continuations import fresh_continuations


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
    kept_iterations = 1  # iterations whose groups a buffer without a capacity keeps

    def __init__(self, buffer: GroupReplayBuffer, fresh_continuations: float = 0.0) -> None:
        self.buffer = buffer
        setting = "PrioritizedGroupReplay.fresh_continuations"
        self.fresh_continuations = within(setting, fresh_continuations, 0, 1, "0.05")
        self.supports_async = not self.fresh_continuations  # continuations need the present policy

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns effective fresh groups, then replayed ones, up to the number sampled if the buffer has enough."""
        effective, ineffective = iteration.split(iteration.rollout())
        candidates = self.candidates(len(ineffective), iteration)
        replayed = self.buffer.replay(effective, ineffective, candidates, self.kept_iterations)
        return effective + replayed + fresh_continuations(self.fresh_continuations, replayed, iteration)

    def candidates(self, places: int, iteration: Iteration) -> Iterable[Group]:
        """Returns the stored groups that may fill the places of ineffective ones, best first."""
        return self.buffer.newest_first(iteration.version, wanted=iteration.still_effective)

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """Redistributes all stored groups over the ranks."""
        return resharded(states, ranks)
