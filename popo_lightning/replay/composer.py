"""Composers turn an iteration's fresh groups into the groups it trains on. One class per rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from random import Random
from typing import Any

from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.core.problems import Problem
from popo_lightning.core.ranks import other_number


class Iteration(ABC):
    """A composer's interface to one iteration. Everything sampled here counts as generated, even if not trained on.

    Attributes:
        version: Present policy version.
        effective_key: Reward component whose spread makes a group effective.
        num_problems: Number of problems that this rank samples per iteration, its share of data.problems_per_iteration.
        group_size: K, responses per problem.
        max_new_tokens: Maximum tokens of a response.
        vocab_size: Number of tokens that the policy knows.
    """

    version: int
    effective_key: str
    num_problems: int
    group_size: int
    max_new_tokens: int
    vocab_size: int

    @abstractmethod
    def rollout(self, count: int | None = None, n: int | None = None) -> list[Group]:
        """Samples groups for the sampler's next problems.

        The present policy samples them; with data.async_level 1 it is the policy before it.

        Args:
            count: Number of problems; by default an iteration's number.
            n: Number of responses to each; by default the group size.
        """

    @abstractmethod
    def sample(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None = None) -> list[Group]:
        """Samples groups for given problems with the present policy.

        Args:
            problems: Problems to ask.
            n: Number of responses to each.
            prefixes: (P,) tokens for each problem, the beginning of an earlier response to continue. They
                become part of the prompt, so they have no loss; the verifier sees the whole response.
        """

    @abstractmethod
    def logprobs(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """Returns (T,) log-probs of each response under the present policy, by one forward pass without gradient.

        Ranks may call it different numbers of times. With sharded weights, ranks that do not call it join the passes of
        the others. Only a rule with collectives of its own must call it equally often on all ranks before each of them.
        """

    @abstractmethod
    def reference_logprobs(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """Returns (T,) log-probs of each response under the first policy; see :meth:`logprobs`.

        Only a composer with `needs_reference` may call it.
        """

    @abstractmethod
    def random(self, *purpose: object) -> Random:
        """Returns a generator for one purpose, seeded by (seed, rank, iteration, purpose), never by global state."""

    def still_effective(self, group: Group) -> bool:
        """Whether a stored group still has a gradient: with limits, the present charges decide."""
        return True

    def split(self, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
        """Returns (effective groups, ineffective groups), each in order."""
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
        trains_on_others: Whether it returns groups that no policy of this run has sampled.
        fresh_continuations: Fraction of replayed responses that are continued for a critic alone; 0 if the rule never
            returns groups with `critic_only`.
        makes_pairs: Whether it returns groups of two, the better response first, with 1 and -1 as their advantages. The
            trust region must then compare pairs.
        needs_reference: Whether it asks for log-probs under the first policy, which must then be kept.
    """

    supports_async: bool = True
    fixes_advantages: bool = False
    follows_reward: bool = False
    trains_on_others: bool = False
    fresh_continuations: float = 0.0
    makes_pairs: bool = False
    needs_reference: bool = False

    @abstractmethod
    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the groups to train on. The behavior weight applies to groups of an earlier policy version."""

    def samples_next(self) -> bool:
        """Returns whether the next :meth:`compose` samples anything. If not, the engine stays asleep with its weights.

        All ranks receive new weights if any of them samples.
        """
        return True

    def passes_before_replay(self, group_size: int) -> int:
        """Returns how often a problem must have been asked before its responses can be replayed.

        It is 0 for rules whose replays do not need a problem to return.

        Args:
            group_size: K, responses per problem.
        """
        return 0

    def trained_last(self) -> Collection[int]:
        """Returns the ids of those groups of the last :meth:`compose` that belong in the last minibatches."""
        return ()

    def report(self) -> dict[str, float]:
        """Returns further metrics of this rank's last iteration, by name; the name decides how ranks are combined.

        Names that end in _groups, _responses, _problems or _prefixes are summed over ranks, and others averaged.
        """
        return {}

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """Redistributes the states in a checkpoint over another number of ranks.

        Args:
            states: :meth:`state_dict` of each rank that wrote the checkpoint.
            ranks: Number of ranks of the resumed run.

        Raises:
            SettingError: The states cannot be redistributed.
        """
        if any(states):
            why = f"what data.composer {type(self).__name__} keeps stays with its rank"
            raise other_number(len(states), ranks, why)
        return [{} for _ in range(ranks)]


class OnPolicy(Composer):
    """Trains on all fresh groups, ineffective ones included: GRPO (2402.03300)."""

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the fresh groups unchanged."""
        return iteration.rollout()


class Filter(Composer):
    """Trains on effective fresh groups only and does not refill the batch: POPO's filter ablation (2606.01281)."""

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the effective fresh groups."""
        return iteration.split(iteration.rollout())[0]


def composed_groups(composer: Composer, iteration: Iteration) -> list[Group]:
    """The groups that a composer composes.

    Raises:
        SettingError: It returned something else.
    """
    found = composer.compose(iteration)
    wrong = [each for each in found if not isinstance(each, Group)] if isinstance(found, list) else [found]
    if wrong:
        within = "a list with " if isinstance(found, list) else ""
        raise SettingError(
            f"data.composer is {type(composer).__name__}, whose compose returned {within}{type(wrong[0]).__name__}; "
            "return a list of groups"
        )
    return found
