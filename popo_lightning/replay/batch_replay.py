"""Composers that train on whole earlier batches: ReMix's mixing, and RAPID's rollouts ahead of the updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch

from popo_lightning.groups import Group
from popo_lightning.objectives.settings import at_least, one_of, within
from popo_lightning.ranks import gathered
from popo_lightning.replay.composers import Composer, Iteration


class ReMixReplay(Composer):
    """ReMix's Mix-PPG: with probability p the data of a recent policy in place of new ones (arXiv 2507.06892).

    At iteration k, with probability p, the batch is that of pi_{k-i}, i drawn from those of 1..N that sampled one;
    otherwise it is sampled now, and kept for the next N iterations. From iteration ``until`` on, the paper's
    reincarnation point, every batch is on-policy.

    Keeps the groups of the last N iterations, ineffective ones included. No forward pass is added. An iteration that
    replays samples nothing, which is where ReMix saves rollouts: with p = 0.4 and N = 2 a share of 1 / (1 + p + p^2)
    = 0.64 of the iterations before ``until`` samples.

    Deviations: the paper does not say whether p holds for a batch or for its parts; ``mix: batch`` is the default
    because only then whole iterations go without rollouts. i is drawn evenly, which is inferred. An iteration that
    replays leaves nothing for later ones, so after N replays in a row there is nothing recent, and the next samples.

    The other parts of ReMix are data.sweeps (its update-to-data ratio), ScaledWidth, ConvexKL and the parameter hook
    Reincarnation.

    Args:
        probability: p, of replaying.
        policies: N, how many policy versions back a batch may come from.
        until: First iteration that is on-policy, as are all after it; null for none.
        mix: batch decides once an iteration, for all ranks alike; group decides for each group, and samples the rest.
    """

    works_ahead = False

    def __init__(
        self,
        probability: float = 0.4,
        policies: int = 2,
        until: int | None = 50,
        mix: Literal["batch", "group"] = "batch",
    ) -> None:
        self.probability = within("ReMixReplay.probability", probability, 0, 1, "0.4")
        self.policies = int(at_least("ReMixReplay.policies", policies, 1, ", such as 2"))
        self.until = None if until is None else int(at_least("ReMixReplay.until", until, 0, ", or null for none"))
        self.mix = one_of("ReMixReplay.mix", mix, ("batch", "group"))
        self._batches: deque[tuple[int, list[Group]]] = deque()  # (iteration that sampled it, its groups)
        self._replay: int | None = None  # iteration whose batch the next one trains on

    def compose(self, iteration: Iteration) -> list[Group]:
        """A stored batch, or a new one, or a mixture by group."""
        if self._replay is not None:
            groups = dict(self._batches)[self._replay]
        elif self.mix == "group":
            groups = self._mixed(iteration)
        else:
            groups = self._sample(iteration, iteration.problems)
        self._look_ahead(iteration)
        return list(groups)

    def samples_next(self) -> bool:
        """Unless a whole batch will be replayed."""
        return self._replay is None

    def _mixed(self, iteration: Iteration) -> list[Group]:
        random = iteration.random("remix")
        stored = [group for _, groups in self._batches for group in groups]
        wanted = sum(random.random() < self.probability for _ in range(iteration.problems))
        replayed = random.sample(stored, min(wanted, len(stored)))
        return self._sample(iteration, iteration.problems - len(replayed)) + replayed

    def _sample(self, iteration: Iteration, count: int) -> list[Group]:
        fresh = iteration.rollout(count)
        self._batches.append((iteration.version, fresh))
        return fresh

    def _look_ahead(self, iteration: Iteration) -> None:
        """Decides now what the next iteration does, so that the engine need not be woken for nothing."""
        following = iteration.version + 1
        oldest = following - self.policies if self.until is None or following < self.until else following
        self._batches = deque((version, groups) for version, groups in self._batches if version >= oldest)
        self._replay = None
        if self.mix == "batch":
            # rank 0's draws: nothing is saved unless all ranks go without rollouts
            random = iteration.random("remix")
            own = torch.tensor([random.random(), random.random()], dtype=torch.float64)
            coin, place = gathered([own])[0][:2].tolist()
            if self._batches and coin < self.probability:
                self._replay = self._batches[int(place * len(self._batches))][0]

    def state_dict(self) -> dict[str, Any]:
        """The stored batches, and what comes next."""
        batches = [{"version": version, "groups": _plain(groups)} for version, groups in self._batches]
        return {"batches": batches, "replay": self._replay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The stored batches, and what comes next."""
        self._batches = deque((batch["version"], _groups(batch["groups"])) for batch in state["batches"])
        self._replay = state["replay"]


class Rapid(Composer):
    """RAPID: H batches are sampled at once, then trained on one by one (arXiv 2510.03515).

    Every H iterations the engine answers H times an iteration's problems with the present weights, in one call; this
    iteration and the next H - 1 train on a batch of them each, without rollouts. The batch of the i-th of these
    iterations is i versions old, which its loss corrects by min(rho, 2): CappedImportance, with behaviour weight One.

    Keeps at most H - 1 batches. No forward pass is added. Rollouts are as many as on-policy, in calls H times as
    large, and the engine is woken and given weights H times less often.

    Deviations: the paper's H and its importance-aware group baseline could not be read; H is a setting, and the
    advantage slot is as elsewhere. Batches are trained on in the order the sampler drew their problems, which is
    random already.

    Args:
        batches: H, iterations to a rollout.
    """

    works_ahead = False

    def __init__(self, batches: int = 4) -> None:
        self.batches = int(at_least("Rapid.batches", batches, 1, ", such as 4"))
        self._waiting: deque[Group] = deque()

    def samples_next(self) -> bool:
        """Only once nothing is waiting."""
        return not self._waiting

    def compose(self, iteration: Iteration) -> list[Group]:
        """The next batch."""
        if not self._waiting:
            self._waiting.extend(iteration.rollout(self.batches * iteration.problems))
        return [self._waiting.popleft() for _ in range(min(iteration.problems, len(self._waiting)))]

    def state_dict(self) -> dict[str, Any]:
        """The groups sampled ahead."""
        return {"waiting": _plain(self._waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The groups sampled ahead."""
        self._waiting = deque(_groups(state["waiting"]))


def _plain(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [group.to_plain() for group in groups]


def _groups(plain: Sequence[dict[str, Any]]) -> list[Group]:
    return [Group.from_plain(group) for group in plain]
