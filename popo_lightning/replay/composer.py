"""Composers: from an iteration's fresh groups to the groups it trains on. One class per rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import Any

from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.core.problems import Problem


class Iteration(ABC):
    """What a composer may know and do. Everything it samples here counts as generated, whether it is trained on or not.

    Attributes:
        version: Present policy version.
        effective_key: Reward component whose spread makes a group effective.
        problems: Problems that this rank samples per iteration, its share of data.problems_per_iteration.
        group_size: K, responses per problem.
    """

    version: int
    effective_key: str
    problems: int
    group_size: int

    @abstractmethod
    def rollout(self, count: int | None = None, n: int | None = None) -> list[Group]:
        """Groups of the sampler's next problems, by the present policy, or with data.async_level 1 by the one before
        it.

        Args:
            count: Problems; an iteration's number unless given.
            n: Responses to each; the group size unless given.
        """

    @abstractmethod
    def sample(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None = None) -> list[Group]:
        """Groups of given problems, by the present policy.

        Args:
            problems: What to ask.
            n: Responses to each.
            prefixes: (P,) tokens for each problem, the beginning of an earlier response to continue. They
                become part of the prompt, so that no loss falls on them; the verifier sees the whole response.
        """

    @abstractmethod
    def logprobs(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """(T,) log-probs of each response under the present policy: one forward pass without gradient.

        Ranks may ask differently often: where weights are split over them, those that do not ask join in. Only a rule
        that exchanges something between ranks by itself has to ask equally often on all of them before it does.
        """

    @abstractmethod
    def random(self, *purpose: object) -> Random:
        """A generator for one purpose, from (seed, rank, iteration, purpose), never from global state."""

    def split(self, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
        """(effective, ineffective), each in order."""
        effective = [group for group in groups if group.is_effective(self.effective_key)]
        return effective, [group for group in groups if not group.is_effective(self.effective_key)]


class Composer(KeepsState, ABC):
    """Slot: decides what is sampled in an iteration and which groups it trains on.

    Attributes:
        supports_async: Whether the composer works with data.async_level 1. It then asks every iteration for the
            sampler's next problems, with group_size responses each, and accepts groups that are one version old.
        state: Attributes that decide later compositions; see :class:`KeepsState`.
        fixes_advantages: Whether it returns groups with fixed advantages, from which a critic cannot learn.
        follows_reward: Whether its `reward_key` must be the component that is trained on.
    """

    supports_async: bool = True
    fixes_advantages: bool = False
    follows_reward: bool = False

    @abstractmethod
    def compose(self, iteration: Iteration) -> list[Group]:
        """Groups to train on. Those of an earlier policy version are replayed: the behaviour weight applies to them."""

    def samples_next(self) -> bool:
        """Whether the next :meth:`compose` samples anything. If not, the engine sleeps on with the weights it has.

        All ranks get the weights where one of them samples.
        """
        return True

    def passes_before_replay(self, group_size: int) -> int:
        """Times a problem must have been asked before anything of it can be replayed; 0 where problems need not return.

        Args:
            group_size: K.
        """
        return 0

    def report(self) -> dict[str, float]:
        """Further numbers of the last iteration, by metric name."""
        return {}

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """What the ranks of a checkpoint kept, for another number of ranks.

        Args:
            states: :meth:`state_dict` of each rank that wrote it.
            ranks: Number of ranks of the resumed run.

        Raises:
            SettingError: What they kept cannot be dealt out anew.
        """
        if any(states):
            raise SettingError(
                f"the checkpoint was written by {len(states)} ranks and this run has {ranks}, but what data.composer "
                f"{type(self).__name__} keeps stays with its rank; resume with as many (trainer.devices x "
                "trainer.num_nodes)"
            )
        return [{} for _ in range(ranks)]


class OnPolicy(Composer):
    """Trains on all fresh groups, ineffective ones included: GRPO (2402.03300)."""

    def compose(self, iteration: Iteration) -> list[Group]:
        """The fresh groups as they are."""
        return iteration.rollout()


class Filter(Composer):
    """Trains on effective fresh groups only and does not refill the batch: POPO's filter ablation (2606.01281)."""

    def compose(self, iteration: Iteration) -> list[Group]:
        """The effective fresh groups."""
        return iteration.split(iteration.rollout())[0]
