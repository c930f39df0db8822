"""ARPO (arXiv 2505.16282): a failed group receives a stored success of its problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from popo_lightning.core.bounds import above, at_least, finite
from popo_lightning.core.groups import Group, Response
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.response_store import ResponseStore


@dataclass(eq=False)
class ARPO(Composer):
    """ARPO: a group that failed receives a stored success of its problem (2505.16282; dvlab-research/ARPO).

    A fresh group has failed if its K successes have std < low_std and mean < low_mean. One of the problem's stored
    successes, drawn at random, replaces its first response, and the advantages are those of the mixed rewards. The
    source takes the stored success's old log-probs from the present policy, so pi_prox / pi_behave is 1. For the same
    rule use behave weight `NoCorrection` with `PPOClip`, whose prox is the present policy for every row. Stored: the
    newest `capacity` successes of each problem, with their behave log-probs (used in the log only). Extra passes and
    rollouts: none.

    Successes are stored after the injection, so those of an iteration cannot fill its own failures.

    As in the source, success alone decides failure, not the reward that is trained on (there success + 0.5 * format): a
    group of eight wrong responses with full format has failed. The std is the population's, and a response with a
    success above 0.1 is stored.

    A problem must come back: nothing is replayed in the first pass over the problems.

    Args:
        capacity: Successes kept per problem.
        low_std: A group fails if the std of its successes is below this and their mean is below low_mean.
        low_mean: Upper bound of the mean in low_std's condition.
        success_key: Reward component that measures success.
        success_above: A response is a success if that component is greater than this.
    """

    state = ("store",)
    transient = ("_injected",)

    capacity: int = 8
    low_std: float = 0.05
    low_mean: float = 0.2
    success_key: str = "acc"
    success_above: float = 0.1

    def __post_init__(self) -> None:
        at_least("ARPO.capacity", self.capacity, 1, " success of each problem")
        above("ARPO.low_std", self.low_std, 0, "0.05")
        finite("ARPO.low_mean", self.low_mean, "0.2")
        self.store = ResponseStore(self.capacity)
        self._injected = 0  # responses injected in the last iteration

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the fresh groups. Failed ones contain a stored success if there is one."""
        fresh = iteration.rollout()
        composed = [self._helped(group, iteration.random("ARPO", place)) for place, group in enumerate(fresh)]
        self._injected = sum(after is not before for after, before in zip(composed, fresh, strict=True))
        for group in fresh:
            self.store.insert(group, [response for response in group.responses if self._succeeded(response)])
        return composed

    def _helped(self, group: Group, random: Random) -> Group:
        successes = self.store.of(group.problem.id)
        if not successes or not self._failed(group):
            return group
        return replace(group, responses=[random.choice(successes), *group.responses[1:]])

    def _failed(self, group: Group) -> bool:
        successes = group.rewards(self.success_key)
        return bool(successes.std(correction=0) < self.low_std and successes.mean() < self.low_mean)

    def _succeeded(self, response: Response) -> bool:
        return response.failure is None and response.parts.get(self.success_key, 0.0) > self.success_above

    def passes_before_replay(self, group_size: int) -> int:
        """Returns how often a problem must have been asked before any of its responses can be replayed."""
        return 1

    def report(self) -> dict[str, float]:
        """Returns the number of responses injected in the last iteration, and the store's size."""
        return {"replay/injected_responses": float(self._injected)} | self.store.report()
