"""The state of the rollouts that a checkpoint holds for every rank, and how a run restores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import lightning as L

from popo_lightning.core.errors import SettingError
from popo_lightning.core.kept_state import Watch, containers_copied
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.ranks import gather_object
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.replay.composer import Composer
from popo_lightning.rollout.ahead import AsyncRollouts
from popo_lightning.rollout.engine_gap import EngineCheck
from popo_lightning.rollout.generation import RolloutGenerator
from popo_lightning.rollout.limits import Limits
from popo_lightning.rollout.problem_sets import ProblemSets
from popo_lightning.rollout.rank_states import PlaceState, RankKeeper, reshard, rules_of, without_other_rules
from popo_lightning.rollout.report import Totals
from popo_lightning.rollout.weight_sync import WeightSync
from popo_lightning.tasks.samplers import PromptSampler


class ResumableRollouts(L.LightningDataModule):
    """The part of :class:`RolloutDataModule` that saves and loads. The data module creates the attributes used here."""

    sampler: PromptSampler
    composer: Composer
    problems: ProblemSets
    generator: RolloutGenerator
    ahead: AsyncRollouts
    weight_sync: WeightSync
    check: EngineCheck | None
    totals: Totals
    limits: Limits
    kept_by_ranks: RankKeeper
    as_of: PlaceState | None
    pending: list[Minibatch]
    rollout_metrics: dict[str, float]
    iteration: int
    async_level: int
    minibatches: int
    ppo_epochs: int
    _stores: dict[str, Any] | None
    _watches: Sequence[Watch]

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.minibatches * self.ppo_epochs

    @property
    def gap_floor(self) -> float | None:
        """Difference of engine and policy as both were loaded, in nats per token; None if unknown."""
        return self.check.floor if self.check is not None else None

    @property
    def _fitting(self) -> bool:
        return self._run.state.fn == "fit"

    @property
    def _run(self) -> L.Trainer:
        assert self.trainer is not None, "RolloutDataModule works inside a Trainer"
        return self.trainer

    @property
    def _module(self) -> PolicyModel:
        return cast(PolicyModel, self._run.lightning_module)

    def place_state(self, anew: bool = True) -> PlaceState:
        """Copies this rank's state now, for a checkpoint that is written later. Not a collective; does not wait.

        It leaves out the groups generated ahead, which do not depend on the resumable point.

        Args:
            anew: Whether to read the states of sampler and composer again, which may be large. Otherwise they are read
                once per iteration.
        """
        if anew or self._stores is None:
            stores = {"sampler": self.sampler.state_dict(), "composer": self.composer.state_dict()}
            self._stores = containers_copied(stores)
            for each in self._watches:
                each.tell()
        rest = {
            "pending": [minibatch.as_it_is() for minibatch in self.pending],  # hooks later attach log-probs
            "rollout_metrics": self.rollout_metrics,
            "groups_made": self.generator.made,
            "callbacks": self.kept_by_ranks.state(),
        }
        common = {
            "iteration": self.iteration,
            "steps": self.steps,
            "rules": rules_of(self.sampler, self.composer, self.problems.fingerprint),
            "totals": asdict(self.totals),
            "limits": self.limits.state_dict(),
            "rollout_weights": self.weight_sync.state_dict(),
            "gap_floor": self.gap_floor,
        }
        return PlaceState(containers_copied(common), self._stores | containers_copied(rest))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that decides the next step. A collective.

        Rank 0 gets every rank's state, because Lightning writes only what rank 0 returns. The others get their own.
        """
        place = self.as_of or self.place_state()
        return place.common | {"ranks": gather_object(place.mine | {"ahead": self.ahead.state_dict()})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes where the checkpoint was written, in the middle of an iteration or between two."""
        world_size, rank = self._run.world_size, self._run.global_rank
        self.iteration = state["iteration"]
        self.totals = Totals(**state["totals"])  # counts that an earlier version lacks are 0
        if not self._fitting:
            return
        self.limits.load_state_dict(state.get("limits", {}))
        self.kept_by_ranks.load([of_rank.get("callbacks", {}) for of_rank in state["ranks"]])
        own = rules_of(self.sampler, self.composer, self.problems.fingerprint)
        states = without_other_rules(state["ranks"], state.get("rules"), own)
        mine = reshard(states, world_size, self.sampler, self.composer)[rank]
        for kind, rule in (("sampler", self.sampler), ("composer", self.composer)):
            if kind in mine:
                rule.load_state_dict(mine[kind])
        self.weight_sync.load_state_dict(state["rollout_weights"])
        if self.check is not None:
            self.check.floor = state.get("gap_floor")
        self.generator.made = mine["groups_made"]
        self.ahead.load_state_dict(mine.get("ahead", {}), self.async_level)
        self.rollout_metrics = mine["rollout_metrics"]
        self.pending = list(mine["pending"])
        if self.pending and state["steps"] != self.steps:
            raise SettingError(
                f"data.minibatches x data.ppo_epochs is {self.steps} but the checkpoint stopped inside an iteration of "
                f"{state['steps']} steps; resume with as many, or from a checkpoint between iterations"
            )
