"""The sampling of one rollout iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from random import Random

import torch
from torch import Tensor

from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.core.ranks import all_reduce
from popo_lightning.core.timing import PhaseClock
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.replay.composer import Iteration
from popo_lightning.rollout.engine_rollouts import EngineRollouts
from popo_lightning.rollout.report import RolloutReport
from popo_lightning.rollout.reward_components import NamedComponent, check_components, named_components

NOTHING, PRESENT, FIRST = range(3)  # the policy whose log-probs a rank asks for


class IterationRollouts(Iteration):
    """Asks the prompt sampler, generates, grades and counts, for one iteration's composer.

    Args:
        data: The run's rollouts: settings, problems, sampler, generator, limits, and groups generated ahead.
        policy: Scores responses.
        report: Counts what is sampled.
        num_problems: Problems per iteration on this rank.
    """

    def __init__(self, data: EngineRollouts, policy: PolicyModel, report: RolloutReport, num_problems: int) -> None:
        self.data, self.policy, self.report = data, policy, report
        self.sampler, self.generator, self.ahead, self.limits = data.sampler, data.generator, data.ahead, data.limits
        self.version = data.iteration
        self.effective_key = report.effective_key
        self.num_problems = num_problems
        self.group_size = data.group_size
        self.max_new_tokens = data.sampling.max_new_tokens
        self._calls = int(len(data.ahead) > 0)  # engine calls, which decide seeds; generating ahead was the first

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Number of tokens that the policy knows."""
        return int(self.policy.model.config.get_text_config().vocab_size)

    def rollout(self, count: int | None = None, n: int | None = None) -> list[Group]:
        """Samples groups for the sampler's next problems; the sampler observes them."""
        count, n = self.num_problems if count is None else count, self.group_size if n is None else n
        ready = self.ahead.take(count, n)
        indices = [index for index, _ in ready]
        groups = self._taken([self.generator.numbered(group) for _, group in ready])
        if further := count - len(ready):
            drawn = self.sampler.draw(further)
            indices += drawn
            groups += self._generated([self.data.problems.train[index] for index in drawn], n)
        self.sampler.observe(indices, groups)
        return groups

    def sample(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None = None) -> list[Group]:
        """Samples groups of n responses to these problems, which continue the prefixes if there are any."""
        return self._generated(problems, n, prefixes) if problems else []

    def _generated(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None = None) -> list[Group]:
        self._calls += 1
        return self._taken(self.generator.make(problems, n, self.data.sampling, self._seed(self._calls), prefixes))

    def still_effective(self, group: Group) -> bool:
        """Whether a stored group is effective at the present charges; true without limits."""
        return not self.limits or self.limits.priced([group])[0].is_effective(self.effective_key)

    def logprobs(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """Returns (T,) log-probs of each response under the present policy."""
        return self._answer(PRESENT, groups, "rescore")

    def reference_logprobs(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """Returns (T,) log-probs of each response under the first policy."""
        return self._answer(FIRST, groups, "rescore")

    def end(self) -> None:
        """Joins the passes that other ranks ask for, until none does. Every rank calls it after it has composed."""
        while asked := self._asked_by_ranks(NOTHING):
            self._scored(asked, [], "rescore")

    def _answer(self, question: int, groups: Sequence[Group], phase: str) -> list[list[Tensor]]:
        if not groups:
            return []
        while (asked := self._asked_by_ranks(question)) != question:
            self._scored(asked, [], phase)  # another rank's question comes first
        found = iter(self._scored(question, groups, phase))
        return [[next(found) for _ in group.responses] for group in groups]

    def _asked_by_ranks(self, question: int) -> int:
        """Agrees with the other ranks on the next pass. A collective with sharded weights, which each pass gathers.

        Returns:
            The greatest question of any rank, which all ranks answer together.
        """
        return int(all_reduce(self.policy.trainer, question, "max")) if self.policy.sharded else question

    def _scored(self, question: int, groups: Sequence[Group], phase: str) -> list[Tensor]:
        minibatch = Minibatch(groups, self.version, 0)
        with self.generator.clock.measure(phase):
            return self.policy.reference_scores(minibatch) if question == FIRST else self.policy.logprobs(minibatch)

    def random(self, *purpose: object) -> Random:
        """Returns a generator for one purpose, seeded by (seed, rank, iteration, purpose), never by global state."""
        return Random("/".join(map(str, (self.data.seed, self.generator.rank, self.version, *purpose))))

    def generate_ahead(self) -> None:
        """Starts to make groups for the sampler's next problems, as many as the next iteration still lacks."""
        clock, missing = PhaseClock(), self.num_problems - len(self.ahead)
        indices = self.sampler.draw(missing) if missing > 0 else []
        problems = [self.data.problems.train[index] for index in indices]
        make = partial(self.generator.apart(clock).make, problems, self.group_size, self.data.sampling, self._seed(1))
        self.ahead.begin(indices, clock, make)

    def _seed(self, call: int) -> int:
        return self.random("rollout", call).getrandbits(62)

    def _taken(self, groups: Sequence[Group]) -> list[Group]:
        """Checks, prices and counts sampled groups, and sets their behave log-probs."""
        self._check_components(groups)
        if self.data.behave == "trainer":
            groups, gaps = scored_by_trainer(groups, self._answer(PRESENT, groups, "prox"))
            self.report.compared(gaps)
        priced = self.limits.priced(groups)
        self.report.sampled(priced)
        return priced

    def _check_components(self, groups: Sequence[Group]) -> None:
        responses = [response for group in groups for response in group.responses if response.failure is None]
        if responses:
            self.data.components.update(name for response in responses for name in response.parts)
            check_components(self._named_components, self.data.components)
            self.limits.check_components(self.data.components)

    @cached_property
    def _named_components(self) -> list[NamedComponent]:
        return named_components(self.data, self.policy.reward_key)


def scored_by_trainer(
    groups: Sequence[Group], logprobs: Sequence[Sequence[Tensor]]
) -> tuple[list[Group], dict[str, float]]:
    """Replaces the groups' behave log-probs by the policy's own, and measures how far the engine's were from them.

    Args:
        groups: Groups just sampled with the policy's present weights.
        logprobs: (T,) log-probs under the policy, of each response of each group.

    Returns:
        The groups, and counts for the report: gap_tokens (number of tokens), gap (sum of their absolute differences in
        nats) and gap_max.
    """
    gaps = [torch.zeros(0)]
    scored = []
    for group, of_group in zip(groups, logprobs, strict=True):
        responses = []
        for response, own in zip(group.responses, of_group, strict=True):
            gaps.append((own - response.behave_logp).abs())
            responses.append(replace(response, behave_logp=own))
        scored.append(replace(group, responses=responses))
    distance = torch.cat(gaps).double()
    largest = float(distance.max()) if len(distance) else 0.0
    return scored, {"gap_tokens": len(distance), "gap": float(distance.sum()), "gap_max": largest}
