"""Rollout state of each rank in a checkpoint, redistributed for a run with another number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from popo_lightning.core.kept_state import class_name
from popo_lightning.core.ranks import other_number
from popo_lightning.replay.composer import Composer
from popo_lightning.tasks.samplers import PromptSampler

RankState = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass
class PlaceState:
    """The rollouts' part of a checkpoint at a resumable point. Its containers are copies.

    Args:
        common: State that is equal on all ranks.
        mine: State of this rank.
    """

    common: dict[str, Any]
    mine: RankState


class RankKeeper:
    """Saves callbacks' state of every rank in a checkpoint's one exchange. Lightning itself saves only rank 0's."""

    def __init__(self) -> None:
        self._give: dict[str, Callable[[], Any]] = {}
        self._loaded: list[dict[str, Any]] = []

    def keep(self, name: str, give: Callable[[], Any]) -> None:
        """Adds state to checkpoints.

        Args:
            name: Name of the state.
            give: Returns this rank's state in plain containers and tensors. Not a collective.
        """
        self._give[name] = give

    def state(self) -> dict[str, Any]:
        """Returns this rank's states by name."""
        return {name: give() for name, give in self._give.items()}

    def load(self, ranks: Sequence[dict[str, Any]]) -> None:
        """Takes :meth:`state` of each rank of a checkpoint."""
        self._loaded = list(ranks)

    def take(self, name: str) -> list[Any]:
        """Removes and returns the named state of each rank of a checkpoint; empty if there is none."""
        return [of_rank.pop(name) for of_rank in self._loaded if name in of_rank]


def reshard(states: list[RankState], ranks: int, sampler: PromptSampler, composer: Composer) -> list[RankState]:
    """Redistributes the states over another number of ranks; with the same number they stay as they are.

    Args:
        states: State of each rank that wrote the checkpoint: sampler, composer, pending, rollout_metrics,
            groups_made, ahead. The state of a rule that begins anew is missing, and stays so.
        ranks: Number of ranks of the resumed run.
        sampler: Sampler, which redistributes its own states.
        composer: Composer, which redistributes its own states.

    Raises:
        SettingError: The number differs, and the checkpoint stopped inside an iteration or a rule's state stays with
            its rank.
    """
    if len(states) == ranks:
        return states
    if any(state["pending"] for state in states):
        between = ", or from a checkpoint between iterations"
        raise other_number(len(states), ranks, "it stopped inside an iteration", between)
    if any(state.get("ahead") for state in states):
        raise other_number(len(states), ranks, "it holds groups generated ahead (data.async_level)")
    rules: dict[str, PromptSampler | Composer] = {"sampler": sampler, "composer": composer}
    dealt = {kind: rule.reshard([s[kind] for s in states], ranks) for kind, rule in rules.items() if kind in states[0]}
    # A group's id is made x ranks + rank. These are the first ids that no rank has used.
    made = max(state["groups_made"] for state in states) * len(states) // ranks + 1
    common = {"pending": [], "rollout_metrics": states[0]["rollout_metrics"], "groups_made": made, "ahead": {}}
    return [{kind: of_ranks[rank] for kind, of_ranks in dealt.items()} | common for rank in range(ranks)]


def rules_of(sampler: PromptSampler, composer: Composer, problems: str) -> dict[str, str]:
    """Returns what a rank's state belongs to: the class of each rule, and the problems.

    Args:
        sampler: The run's sampler.
        composer: The run's composer.
        problems: Fingerprint of the training problems.
    """
    return {"sampler": class_name(sampler), "composer": class_name(composer), "problems": problems}


def without_other_rules(states: list[RankState], rules: dict[str, str] | None, own: dict[str, str]) -> list[RankState]:
    """Leaves out the state of another rule, or of the same rule with other problems. This run's rule begins anew.

    Args:
        states: State of each rank that wrote the checkpoint.
        rules: :func:`rules_of` of the checkpoint; None if an earlier version wrote it.
        own: :func:`rules_of` of this run.
    """
    if rules is None:
        return states
    for kind in ("sampler", "composer"):
        if rules[kind] != own[kind]:
            log.warning("data.%s is %s; the checkpoint's is %s, so it begins anew", kind, own[kind], rules[kind])
        elif rules["problems"] != own["problems"]:
            log.warning("data.task has other problems than the checkpoint's, so data.%s begins anew", kind)
        else:
            continue
        states = [{name: state for name, state in each.items() if name != kind} for each in states]
    return states
