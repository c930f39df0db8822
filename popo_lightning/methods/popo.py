"""POPO (arXiv 2606.01281): the most recent stored effective groups replace ineffective ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from popo_lightning.core.groups import Group
from popo_lightning.replay.buffer import GroupReplayBuffer, redistribute
from popo_lightning.replay.composer import Composer, Iteration


class PrioritizedGroupReplay(Composer):
    """POPO (2606.01281): replaces each ineffective group by the most recent stored effective group.

    Selection precedes insertion, so an iteration's own groups cannot fill its own places; they would be copies with
    weight 1. A buffer with too few groups is a normal state: places that cannot be filled stay empty, and the loss
    divides by the tokens of the groups there are.

    Args:
        buffer: Replay buffer of effective groups.
    """

    state = ("buffer",)

    def __init__(self, buffer: GroupReplayBuffer) -> None:
        self.buffer = buffer

    def compose(self, iteration: Iteration) -> list[Group]:
        """Effective fresh groups, then replayed ones: as many as were sampled, if the buffer has them."""
        fresh = iteration.rollout()
        effective, ineffective = iteration.split(fresh)
        problems = {group.problem.id for group in effective}
        replayed = self.buffer.newest(len(ineffective), iteration.version, exclude_problems=problems)
        self.buffer.used(replayed)
        self.buffer.insert(effective, len(fresh))
        return effective + replayed

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """All stored groups, dealt out anew."""
        dealt = redistribute([state["buffer"]["groups"] for state in states], ranks)
        return [{"buffer": {"groups": groups}} for groups in dealt]
