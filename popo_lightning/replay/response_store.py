"""A store of single responses per problem, for rules that replay them when the problem is asked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.kept_state import KeepsState


class ResponseStore(KeepsState):
    """The newest responses of each problem, by problem id, each with the policy version that sampled it.

    Prompts are not stored: a response is replayed with the current prompt of its problem, when the problem is asked
    again. Each rank keeps only its own samples.

    Args:
        capacity: Maximum number of responses per problem; the oldest leave first.
    """

    state = ("_responses",)

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._responses: dict[str, list[Response]] = {}

    def of(self, problem: str) -> list[Response]:
        """Returns the stored responses to a problem, oldest first."""
        return list(self._responses.get(problem, ()))

    def insert(self, group: Group, responses: Sequence[Response]) -> None:
        """Adds some of a group's responses, each as the newest of its problem."""
        if responses:
            kept = self._responses.setdefault(group.problem.id, [])
            kept.extend(replace(response, version=group.version_of(response)) for response in responses)
            del kept[: -self.capacity]

    def report(self) -> dict[str, float]:
        """Returns the number of problems with stored responses, and of stored responses."""
        return {
            "replay/stored_problems": float(len(self._responses)),
            "replay/stored_responses": float(sum(map(len, self._responses.values()))),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the saved responses, and keeps the newest if the capacity is smaller now."""
        super().load_state_dict(state)
        for kept in self._responses.values():
            del kept[: -self.capacity]
