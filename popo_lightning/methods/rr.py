"""RR: rollouts restart from stored prefixes of problems not yet solved."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from torch import Tensor

from popo_lightning.core.bounds import at_least, between
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.problems import Problem
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.prefixes import checked_shares, cut_response


@dataclass
class StoredPrefix:
    """The beginning of a failed response, and the outcomes of rollouts from it.

    Args:
        problem: The problem it answers.
        tokens: (P,) tokens of the response.
        version: Policy version of the iteration that cut it.
        tries: Number of responses that continued it.
        successes: Number of those that succeeded.
    """

    problem: Problem
    tokens: Tensor
    version: int
    tries: int = 0
    successes: int = 0


@dataclass(eq=False)
class PrefixRestarts(Composer):
    """RR: some rollouts restart from promising intermediate states of unsolved problems (2504.14363).

    A problem whose fresh group has no success is unsolved. Its best response by reward (any of equal ones) is cut at a
    random length, and the beginning is stored. In each of the first `stop_at` iterations, a share of the problems is
    asked again from the stored prefixes with the greatest estimated success,

        value = (successes + a) / (tries + a + b),      prior Beta(a, b),

    the newest first among equal ones. They replace as many of the sampler's problems, so the number of responses stays
    the same. The prefix is part of the prompt, so it has no loss; the restarted responses are on-policy. Stored: the
    prefixes. Extra passes and rollouts: none.

    A prefix is dropped when its problem is solved from the prompt, when all of its restarts succeed (nothing is left to
    learn from it), when its value falls below `min_value`, when its problem fails again and the prefix is no better
    than an untried one, or when `capacity` is reached (lowest value first, then oldest).

    Deviations: the source chooses states by the value model of its PPO. There is no critic here; past rollouts with an
    optimistic prior replace it. Where to cut, how many to keep, when to end and every threshold are unknown, so they
    are settings with defaults chosen here. Ranks restart from what they sampled themselves.

    Args:
        share: Fraction of an iteration's problems that restart, if there are as many prefixes; at least 1 problem.
        stop_at: Number of iterations with restarts; later sampling is as usual. null restarts to the end.
        cut: Minimum and maximum length of a prefix as a fraction of the response's tokens.
        capacity: Maximum number of prefixes; one per problem.
        prior: a and b, the successes and failures credited to an untried prefix.
        min_value: Value below which a prefix is dropped.
        reward_key: Reward component that chooses a failed group's best response.
        success_key: Reward component that measures success.
        success_above: A response is a success if that component is greater than this.
    """

    follows_reward = True

    share: float = 0.25
    stop_at: int | None = 100
    cut: tuple[float, float] = (0.25, 0.75)
    capacity: int = 256
    prior: tuple[float, float] = (1.0, 1.0)
    min_value: float = 0.1
    reward_key: str = "score"
    success_key: str = "acc"
    success_above: float = 0.5

    def __post_init__(self) -> None:
        between("PrefixRestarts.share", self.share, 0, 1, ", such as 0.25")
        if self.stop_at is not None:
            at_least("PrefixRestarts.stop_at", self.stop_at, 1, " iteration, or null for all")
        checked_shares("PrefixRestarts", self.cut)
        at_least("PrefixRestarts.capacity", self.capacity, 1, " prefix")
        if not min(self.prior) > 0:
            raise SettingError(f"PrefixRestarts.prior is {list(self.prior)}; both must be above 0, such as [1, 1]")
        self._untried = self.prior[0] / sum(self.prior)  # value of an untried prefix
        if not 0 <= self.min_value <= self._untried:
            raise SettingError(
                f"PrefixRestarts.min_value is {self.min_value}; an untried prefix has a value of {self._untried:.3g} "
                "(PrefixRestarts.prior), so use 0 up to that"
            )
        self._stored: dict[str, StoredPrefix] = {}  # by problem id
        self._restarted: list[Group] = []  # restarted groups of the last iteration

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns fresh groups, then restarted ones, which replace as many fresh ones."""
        if self.stop_at is not None and iteration.version >= self.stop_at:
            self._stored, self._restarted = {}, []
            return iteration.rollout()
        chosen = self._chosen(iteration)
        self._restarted = iteration.sample(
            [prefix.problem for prefix in chosen], iteration.group_size, [prefix.tokens for prefix in chosen]
        )
        fresh = iteration.rollout(iteration.num_problems - len(chosen))
        for prefix, group in zip(chosen, self._restarted, strict=True):
            self._tried(prefix, group)
        for place, group in enumerate(fresh):
            self._asked(group, iteration.random("PrefixRestarts", place))
        for problem in sorted(self._stored, key=self._rank)[self.capacity :]:
            del self._stored[problem]
        return fresh + self._restarted

    def value(self, prefix: StoredPrefix) -> float:
        """Estimates the success rate of a rollout from this prefix."""
        a, b = self.prior
        return (prefix.successes + a) / (prefix.tries + a + b)

    def _rank(self, problem: str) -> tuple[float, int]:
        """Returns the sort key: greatest value first, then newest."""
        prefix = self._stored[problem]
        return -self.value(prefix), -prefix.version

    def _chosen(self, iteration: Iteration) -> list[StoredPrefix]:
        if iteration.num_problems < 2:
            raise SettingError(
                "a rank samples 1 problem an iteration (data.problems_per_iteration over the ranks) and "
                "PrefixRestarts would leave no room for new ones; use at least 2"
            )
        count = max(1, round(self.share * iteration.num_problems))
        best = sorted(self._stored, key=self._rank)[: min(count, iteration.num_problems - 1)]
        return [self._stored[problem] for problem in best]

    def _tried(self, prefix: StoredPrefix, group: Group) -> None:
        """Updates a prefix by its restarts, and drops it if it has become useless."""
        successes = self._successes(group)
        prefix.tries += len(group.responses)
        prefix.successes += successes
        if successes == len(group.responses) or self.value(prefix) < self.min_value:
            del self._stored[prefix.problem.id]

    def _asked(self, group: Group, random: Random) -> None:
        """Drops the prefix of a solved problem, or stores a new one for an unsolved problem."""
        problem = group.problem.id
        if self._successes(group):
            self._stored.pop(problem, None)
            return
        before = self._stored.get(problem)
        # A response of one token has no prefix.
        cuttable = [response for response in group.responses if len(response.token_ids) > 1]
        if not cuttable or (before is not None and self.value(before) > self._untried):
            return
        rewards = [response.parts.get(self.reward_key, 0.0) for response in cuttable]
        best = [response for response, reward in zip(cuttable, rewards, strict=True) if reward == max(rewards)]
        tokens = cut_response(random.choice(best), self.cut, random)
        self._stored[problem] = StoredPrefix(group.problem, tokens, group.version)

    def _successes(self, group: Group) -> int:
        return int((group.rewards(self.success_key) > self.success_above).sum())

    def report(self) -> dict[str, float]:
        """Returns the number of prefixes, and numbers about the last iteration's restarts."""
        restarts = [len(group.responses) for group in self._restarted]
        found = {"replay/stored_prefixes": float(len(self._stored)), "replay/restarted_groups": float(len(restarts))}
        if restarts:
            successes = sum(map(self._successes, self._restarted))
            tokens = sum(group.prefix_tokens for group in self._restarted)
            found["replay/restart_success"] = successes / sum(restarts)
            found["replay/prefix_tokens"] = tokens / len(restarts)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns the prefixes with their outcomes."""
        return {"stored": [dict(vars(prefix)) for prefix in self._stored.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        stored = [StoredPrefix(**plain) for plain in state["stored"]]
        self._stored = {prefix.problem.id: prefix for prefix in stored}
