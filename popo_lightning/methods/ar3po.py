"""AR3PO: few responses first, more for problems without a correct one, and a stored correct one if none comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.replay.composer import Composer, Iteration

RIGHT = 0.5  # a response is correct if its acc is above this


class StagedSampling(Composer):
    """AR3PO: adaptive rollout and response reuse (2509.25808).

    Adaptive rollout: the group size K is split over stages. Every problem gets the responses of the first stage.
    Problems without a correct response (acc) also get those of the next stage, and so on. Groups therefore differ in
    size, and each is normalized by its own responses.

    Response reuse: if K responses contain no correct one, a stored correct response of the same problem, if there is
    one, replaces the last wrong one. It keeps its own policy version and behave log-probs, so the behavior weight
    applies to it alone; its prox is the present policy's. The newest correct response of each problem is stored, after
    the choice. Replay does not consume.

    Merging: the engine makes one group per stage and problem. These become one group, with the identity, prompt and
    version of the first stage's group and all responses in the order sampled. All share the iteration's policy version.

    Stored: one correct response per problem with its log-probs. Extra passes: none. At most K responses per problem.

    Deviations: the paper documents the two ideas and a mean of 5.7 responses per problem. It does not document the
    number and size of the stages, what is stored, for how long, and the importance weight. Two stages of K/2 at K = 8,
    with 43% of problems without a correct response after 4, would give 5.7. All groups are trained on, effective or
    not, as in GRPO. A prompt sampler that learns from outcomes sees the first stage only.

    Args:
        stages: Number of stages that share the group size. The first stages get the remainder.
        capacity: Maximum number of problems with a stored response. The problem whose response is oldest leaves first.
            null keeps all.
        max_age: Maximum age of a reused response in policy versions; null sets no limit.
    """

    supports_async = False
    state = ("_right",)

    def __init__(self, stages: int = 2, capacity: int | None = None, max_age: int | None = None) -> None:
        self.stages = at_least("data.composer.stages", stages, 1, ", which samples whole groups at once")
        if capacity is not None:
            at_least("data.composer.capacity", capacity, 0, " for no reuse, or null to keep all")
        if max_age is not None:
            at_least("data.composer.max_age", max_age, 1, ", the age of the newest stored one, or null for no limit")
        self.capacity = capacity
        self.max_age = max_age
        self._right: dict[str, Response] = {}  # newest correct response by problem id, oldest first

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns all fresh groups in order; their sizes differ."""
        first, *later = self._sizes(iteration.group_size)
        groups = iteration.rollout(n=first)
        for size in later:
            unsolved = [place for place, group in enumerate(groups) if not _right_ones(group)]
            more = iteration.sample([groups[place].problem for place in unsolved], size)
            for place, further in zip(unsolved, more, strict=True):
                groups[place] = merged(groups[place], further)
        composed = [group if _right_ones(group) else self._rescued(group, iteration.version) for group in groups]
        self._store(groups)
        return composed

    def _sizes(self, group_size: int) -> list[int]:
        """Returns the number of responses of each stage."""
        size, left_over = divmod(group_size, self.stages)
        sizes = [size + (stage < left_over) for stage in range(self.stages)]
        if sizes[0] < 2 or not size:
            raise SettingError(
                f"data.composer.stages is {self.stages}, which leaves {sizes[0]} of {group_size} responses "
                "(data.group_size) for the first; a group needs two to differ, so lower the stages or raise the size"
            )
        return sizes

    def _rescued(self, group: Group, version: int) -> Group:
        stored = self._right.get(group.problem.id)
        if stored is None or stored.version is None:
            return group
        if self.max_age is not None and version - stored.version > self.max_age:
            return group
        return replace(group, responses=[*group.responses[:-1], stored])

    def _store(self, groups: Sequence[Group]) -> None:
        for group in groups:
            if right := _right_ones(group):
                self._right.pop(group.problem.id, None)
                self._right[group.problem.id] = replace(right[-1], version=group.version)
        while self.capacity is not None and len(self._right) > self.capacity:
            del self._right[next(iter(self._right))]


def merged(group: Group, further: Group) -> Group:
    """Appends the responses of another group, which must have the same problem and policy version."""
    if (group.problem.id, group.version) != (further.problem.id, further.version):
        raise ValueError(f"groups {group.id} and {further.id} differ in problem or policy version")
    return replace(group, responses=[*group.responses, *further.responses])


def _right_ones(group: Group) -> list[Response]:
    return [response for response in group.responses if response.parts.get("acc", 0.0) > RIGHT]
