"""Composers: from an iteration's fresh groups to the groups it trains on. One class a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from popo_lightning.groups import Group
from popo_lightning.replay.buffer import GroupReplayBuffer


@dataclass(frozen=True)
class Iteration:
    """What a composer may know and do.

    Args:
        version: Present policy version.
        effective_by: Reward part whose spread makes a group effective.
        rollout: Samples and grades this many further problems with the present policy.
    """

    version: int
    effective_by: str
    rollout: Callable[[int], list[Group]]

    def split(self, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
        """(effective, ineffective), each in order."""
        effective = [group for group in groups if group.is_effective(self.effective_by)]
        return effective, [group for group in groups if not group.is_effective(self.effective_by)]


class Composer(ABC):
    """Slot: decides which groups an iteration trains on."""

    @abstractmethod
    def compose(self, fresh: Sequence[Group], iteration: Iteration) -> list[Group]:
        """Groups to train on. Those of the present policy version count as fresh, all others as replayed."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later compositions, in plain containers and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # most rules keep nothing
        """Inverse of :meth:`state_dict`."""


class OnPolicy(Composer):
    """All fresh groups, ineffective ones included: GRPO (2402.03300)."""

    def compose(self, fresh: Sequence[Group], iteration: Iteration) -> list[Group]:
        """The fresh groups as they are."""
        return list(fresh)


class Filter(Composer):
    """Effective fresh groups only, with no refill: POPO's filter ablation (2606.01281)."""

    def compose(self, fresh: Sequence[Group], iteration: Iteration) -> list[Group]:
        """The effective fresh groups."""
        return iteration.split(fresh)[0]


class PrioritizedGroupReplay(Composer):
    """POPO (2606.01281): the place of each ineffective group goes to the most recent stored effective one.

    Selection comes before insertion, so that an iteration's own groups cannot fill its own holes: they would be
    copies with weight 1. A short buffer is a normal state: what cannot be filled stays empty, and the loss divides
    by the tokens there are.

    Args:
        buffer: Where effective groups wait.
    """

    def __init__(self, buffer: GroupReplayBuffer) -> None:
        self.buffer = buffer

    def compose(self, fresh: Sequence[Group], iteration: Iteration) -> list[Group]:
        """Effective fresh groups, then replayed ones, ``len(fresh)`` in all if the buffer has them."""
        effective, ineffective = iteration.split(fresh)
        problems = {group.problem.id for group in effective}
        replayed = self.buffer.newest(len(ineffective), iteration.version, exclude_problems=problems)
        self.buffer.insert(effective, len(fresh))
        return effective + replayed

    def state_dict(self) -> dict[str, Any]:
        """The buffer."""
        return {"buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The buffer."""
        self.buffer.load_state_dict(state["buffer"])
