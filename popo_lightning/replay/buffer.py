"""The buffer of recent effective groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group

T = TypeVar("T")


class GroupReplayBuffer:
    """A first-in, first-out buffer of whole groups, in compact CPU tensors.

    Replay does not consume. With a fraction f of effective groups, filling the other 1 - f uses each stored group about
    (1 - f) / f times. A group leaves when newer ones push it out or when it is older than ``max_age``.

    Inserting costs time in proportion to what is inserted. Selecting costs a sort of versions and what is selected.
    Neither depends on how much is stored otherwise.

    Args:
        capacity: Maximum number of groups. null keeps as many as an iteration samples; that is enough, because the
            newest are taken first and no more than that can be missing.
        max_age: Maximum age of a replayed group in policy versions; null sets no limit.
        max_uses: Maximum number of times a group is replayed; null sets no limit, as in the paper. A limit helps where
            few groups are effective; otherwise the same group is trained on every iteration until it is too old.
    """

    def __init__(self, capacity: int | None = None, max_age: int | None = 8, max_uses: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise SettingError(
                f"data.composer.buffer.capacity is {capacity}; the buffer must hold at least 1 group, or null for as "
                "many as an iteration samples"
            )
        if max_age is not None and max_age < 1:
            raise SettingError(
                f"data.composer.buffer.max_age is {max_age}; the newest replayed group is 1 version old, so use at "
                "least 1, or null for no limit"
            )
        if max_uses is not None and max_uses < 1:
            raise SettingError(
                f"data.composer.buffer.max_uses is {max_uses}; a group that waits must be replayed at least 1 time, or "
                "give null for no limit"
            )
        self.capacity = capacity
        self.max_age = max_age
        self.max_uses = max_uses
        self._groups: deque[Group] = deque()
        self._uses: dict[int, int] = {}  # by the number of a stored group
        self._by_version: dict[int, deque[Group]] = {}  # the same, in order of insertion within a version

    def __len__(self) -> int:
        return len(self._groups)

    def insert(self, groups: Sequence[Group], sampled: int) -> None:
        """Adds groups in order, each as the newest; the oldest fall out.

        Args:
            groups: What to keep.
            sampled: Groups of an iteration: the capacity where none is set.
        """
        self._add(groups)
        while len(self._groups) > (self.capacity or sampled):
            gone = self._groups.popleft()
            version = gone.version
            self._uses.pop(gone.id, None)
            self._by_version[version].popleft()  # the same group: the first inserted, and so the first of its version
            if not self._by_version[version]:
                del self._by_version[version]

    def _add(self, groups: Iterable[Group]) -> None:
        for group in groups:
            self._groups.append(group)
            self._by_version.setdefault(group.version, deque()).append(group)

    def newest(self, count: int, version: int, min_age: int = 1, exclude_problems: Collection[str] = ()) -> list[Group]:
        """Up to ``count`` groups, newest version first and in order of insertion within a version.

        No problem comes twice, neither among these nor with ``exclude_problems``, as long as there are others;
        repetitions fill what is left. Fewer than ``count`` groups, or none, is a normal answer.

        Args:
            count: Groups wanted.
            version: The present policy version: age is version - group.version.
            min_age: Youngest group allowed, in versions.
            exclude_problems: Problem ids that the batch already has.
        """
        return one_of_each_problem(self._newest_first(version, min_age), count, exclude_problems)

    def used(self, groups: Iterable[Group]) -> None:
        """Counts a use of each of these stored groups, which is what ``max_uses`` limits."""
        for group in groups:
            self._uses[group.id] = self._uses.get(group.id, 0) + 1

    def usable(self, version: int, min_age: int = 1) -> list[Group]:
        """All groups of an allowed age with uses left, newest version first and in order of insertion within one."""
        return list(self._newest_first(version, min_age))

    def _newest_first(self, version: int, min_age: int) -> Iterator[Group]:
        for stored in sorted(self._by_version, reverse=True):
            if self.max_age is not None and stored < version - self.max_age:
                return
            if stored <= version - min_age:
                yield from filter(self._has_uses_left, self._by_version[stored])

    def _has_uses_left(self, group: Group) -> bool:
        return self.max_uses is None or self._uses.get(group.id, 0) < self.max_uses

    def state_dict(self) -> dict[str, Any]:
        """Each group with its uses."""
        return {"groups": [(group, self._uses.get(group.id, 0)) for group in self._groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the saved groups, of which the present capacity keeps the newest."""
        saved = state["groups"] if self.capacity is None else state["groups"][-self.capacity :]
        self._groups, self._by_version = deque(), {}
        self._add(group for group, _ in saved)
        self._uses = {group.id: uses for group, uses in saved}


def redistribute(stored: Sequence[Sequence[T]], ranks: int) -> list[list[T]]:
    """The stores of several ranks as those of another number of ranks, each in the order it was.

    Args:
        stored: A rank's each, what was stored last at the end.
        ranks: Stores wanted.
    """
    newest_first = [
        store[-1 - place] for place in range(max(map(len, stored))) for store in stored if place < len(store)
    ]
    return [newest_first[rank::ranks][::-1] for rank in range(ranks)]


def one_of_each_problem(ranked: Iterable[Group], count: int, exclude_problems: Collection[str] = ()) -> list[Group]:
    """The first ``count`` groups, best first, where a problem that is there already gives way to any other.

    Args:
        ranked: Best first.
        count: Groups wanted; fewer if there are no more.
        exclude_problems: Problem ids that the batch already has.
    """
    seen = set(exclude_problems)
    chosen: list[Group] = []
    repeated: list[Group] = []
    for group in ranked:
        if len(chosen) == count:
            break
        if group.problem.id in seen:
            repeated.append(group)
        else:
            seen.add(group.problem.id)
            chosen.append(group)
    return chosen + repeated[: count - len(chosen)]
