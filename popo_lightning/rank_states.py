"""What the ranks of a checkpoint kept of their rollouts, for a run with another number of ranks."""

from __future__ import annotations

from typing import Any

from popo_lightning.errors import SettingError
from popo_lightning.replay.composers import Composer
from popo_lightning.replay.samplers import PromptSampler

RankState = dict[str, Any]


def for_ranks(states: list[RankState], ranks: int, sampler: PromptSampler, composer: Composer) -> list[RankState]:
    """The states as they are, or dealt out anew.

    Args:
        states: Of each rank that wrote the checkpoint: sampler, composer, pending, rollout_metrics, groups_made,
            ahead.
        ranks: Those that go on.
        sampler: Knows how its states are dealt out.
        composer: As well.

    Raises:
        SettingError: The number differs, and the checkpoint stopped inside an iteration or a rule's state stays with
            its rank.
    """
    if len(states) == ranks:
        return states
    if any(state["pending"] for state in states):
        raise SettingError(
            f"the checkpoint was written by {len(states)} ranks inside an iteration and this run has {ranks}; resume "
            "with as many (trainer.devices x trainer.num_nodes), or from a checkpoint between iterations"
        )
    if any(state.get("ahead") for state in states):
        raise SettingError(
            f"the checkpoint was written by {len(states)} ranks with groups generated ahead (data.lag) and this run "
            f"has {ranks}; resume with as many (trainer.devices x trainer.num_nodes)"
        )
    samplers = sampler.for_ranks([state["sampler"] for state in states], ranks)
    composers = composer.for_ranks([state["composer"] for state in states], ranks)
    # groups are numbered made x ranks + rank: the first numbers that nobody has given
    made = max(state["groups_made"] for state in states) * len(states) // ranks + 1
    common = {"pending": [], "rollout_metrics": states[0]["rollout_metrics"], "groups_made": made, "ahead": {}}
    return [{"sampler": s, "composer": c} | common for s, c in zip(samplers, composers, strict=True)]
