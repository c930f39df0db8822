"""The buffer of recent effective groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group

T = TypeVar("T")
Wanted = Callable[[Group], bool]
"""Whether a stored group may be replayed, such as `Iteration.still_effective`."""


def any_group(group: Group) -> bool:
    """Admits every stored group."""
    return True


class GroupReplayBuffer:
    """A first-in, first-out buffer of whole groups, in compact CPU tensors.

    Replay does not consume. With a fraction f of effective groups, filling the other 1 - f uses each stored group about
    (1 - f) / f times. A group leaves when newer ones push it out or when it is older than ``max_age``.

    Inserting takes time in proportion to the groups inserted. Selecting sorts the versions and then takes time in
    proportion to the groups selected.

    Args:
        capacity: Maximum number of groups. null keeps as many as an iteration samples. That is enough, because the
            newest are taken first and an iteration replaces at most that many.
        max_age: Maximum age of a replayed group in policy versions; null sets no limit.
        max_uses: Maximum number of times a group is replayed; null sets no limit, as in the paper. A limit helps where
            few groups are effective; otherwise the same group is trained on every iteration until it is too old.
    """

    def __init__(self, capacity: int | None = None, max_age: int | None = 8, max_uses: int | None = None) -> None:
        for name, value, reason in (
            (
                "capacity",
                capacity,
                "it must hold at least 1 group, or null for as many as an iteration samples",
            ),
            ("max_age", max_age, "the newest replayed group is 1 version old, so use at least 1, or null for no limit"),
            ("max_uses", max_uses, "a group that waits must be replayed at least 1 time, or give null for no limit"),
        ):
            if value is not None and value < 1:
                raise SettingError(f"data.composer.buffer.{name} is {value}; {reason}")
        self.capacity = capacity
        self.max_age = max_age
        self.max_uses = max_uses
        self._groups: deque[Group] = deque()
        self._uses: dict[int, int] = {}  # by the id of a stored group
        self._by_version: dict[int, deque[Group]] = {}  # the same groups, in order of insertion within a version

    def __len__(self) -> int:
        return len(self._groups)

    def insert(self, groups: Sequence[Group], sampled: int) -> None:
        """Adds groups in order, each as the newest; the oldest fall out.

        Args:
            groups: Groups to store.
            sampled: Number of groups an iteration samples, which is the capacity if none is set.
        """
        self._add(groups)
        while len(self._groups) > (self.capacity or sampled):
            gone = self._groups.popleft()
            version = gone.version
            self._uses.pop(gone.id, None)
            self._by_version[version].popleft()  # the same group, because the oldest is also the first of its version
            if not self._by_version[version]:
                del self._by_version[version]

    def _add(self, groups: Iterable[Group]) -> None:
        for group in groups:
            self._groups.append(group)
            self._by_version.setdefault(group.version, deque()).append(group)

    def newest(self, count: int, version: int, min_age: int = 1, exclude_problems: Collection[str] = ()) -> list[Group]:
        """Returns up to ``count`` groups, newest version first and in order of insertion within a version.

        Groups of problems that are new to the batch come first; repeated problems, or those of ``exclude_problems``,
        fill the rest. Fewer than ``count`` groups, or none, is a normal answer.

        Args:
            count: Number of groups wanted.
            version: Present policy version. A group's age is version - group.version.
            min_age: Minimum age of a group in policy versions.
            exclude_problems: Problem ids that the batch already has.
        """
        return one_of_each_problem(self.newest_first(version, min_age), count, exclude_problems)

    def used(self, groups: Iterable[Group]) -> None:
        """Counts one use of each of these stored groups. ``max_uses`` limits the uses."""
        for group in groups:
            self._uses[group.id] = self._uses.get(group.id, 0) + 1

    def replay(
        self,
        effective: Sequence[Group],
        ineffective: Sequence[Group],
        candidates: Iterable[Group],
        iterations: int = 1,
    ) -> list[Group]:
        """Returns stored groups to replace an iteration's ineffective ones, then stores the effective ones.

        Selection precedes insertion, so an iteration's own groups cannot fill its own places.

        Args:
            effective: Fresh groups that are kept. Their problems are excluded as :meth:`newest` says.
            ineffective: Fresh groups to replace.
            candidates: Stored groups that may replace them, best first, such as :meth:`newest_first`.
            iterations: Number of iterations whose groups are kept if no capacity is set.
        """
        problems = {group.problem.id for group in effective}
        replayed = one_of_each_problem(candidates, len(ineffective), problems)
        self.used(replayed)
        self.insert(effective, iterations * (len(effective) + len(ineffective)))
        return replayed

    def usable(self, version: int, min_age: int = 1, wanted: Wanted = any_group) -> list[Group]:
        """Returns all groups of an allowed age with uses left, in the order of :meth:`newest`."""
        return list(self.newest_first(version, min_age, wanted))

    def newest_first(self, version: int, min_age: int = 1, wanted: Wanted = any_group) -> Iterator[Group]:
        """Yields what :meth:`usable` returns, so that a rule which needs only the first few stops early."""
        for stored in sorted(self._by_version, reverse=True):
            if self.max_age is not None and stored < version - self.max_age:
                return
            if stored <= version - min_age:
                yield from filter(wanted, filter(self._has_uses_left, self._by_version[stored]))

    def _has_uses_left(self, group: Group) -> bool:
        return self.max_uses is None or self._uses.get(group.id, 0) < self.max_uses

    def state_dict(self) -> dict[str, Any]:
        """Returns each group with its number of uses."""
        return {"groups": [(group, self._uses.get(group.id, 0)) for group in self._groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the saved groups, and keeps the newest if the capacity is smaller now."""
        saved = state["groups"] if self.capacity is None else state["groups"][-self.capacity :]
        self._groups, self._by_version = deque(), {}
        self._add(group for group, _ in saved)
        self._uses = {group.id: uses for group, uses in saved}


def redistribute(stored: Sequence[Sequence[T]], ranks: int) -> list[list[T]]:
    """Redistributes the stores of several ranks over another number of ranks, each oldest first.

    Args:
        stored: Store of each rank, with the newest item last.
        ranks: Number of stores wanted.
    """
    newest_first = [
        store[-1 - place] for place in range(max(map(len, stored))) for store in stored if place < len(store)
    ]
    return [newest_first[rank::ranks][::-1] for rank in range(ranks)]


def resharded(states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """Redistributes the states of a rule that stores groups in `buffer` and nothing else.

    Args:
        states: State of each rank.
        ranks: Number of states wanted.
    """
    dealt = redistribute([state["buffer"]["groups"] for state in states], ranks)
    return [{"buffer": {"groups": groups}} for groups in dealt]


def one_of_each_problem(ranked: Iterable[Group], count: int, exclude_problems: Collection[str] = ()) -> list[Group]:
    """Returns ``count`` groups, best first, but repeated problems only after all others.

    Args:
        ranked: Groups, best first.
        count: Number of groups wanted. There are fewer if `ranked` has fewer.
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
