"""Groups made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.replay.composer import Iteration


def response(
    tokens: Sequence[int] = (3, 1),
    logp: Sequence[float] | None = None,
    score: float = 0.0,
    acc: float | None = None,
    finish_reason: str = "stop",
    failure: str | None = None,
) -> Response:
    values = [-0.5] * len(tokens) if logp is None else list(logp)
    parts = {"score": score, "acc": score if acc is None else acc}
    return Response(torch.tensor(tokens), torch.tensor(values), finish_reason, "text", parts, failure)


def group(
    id: int,
    version: int = 0,
    problem: str | None = None,
    scores: Sequence[float] = (0.0, 1.0),
    accs: Sequence[float] | None = None,
) -> Group:
    accs = scores if accs is None else accs
    responses = [response(score=score, acc=acc) for score, acc in zip(scores, accs, strict=True)]
    asked = Problem(problem or f"problem {id}", "1,2>3:", {"numbers": [1, 2], "target": 3}, {"level": 2})
    return Group(id, asked, torch.tensor([4, 5]), responses, version)


def ids(groups: Sequence[Group]) -> list[int]:
    return [group.id for group in groups]


@dataclass
class GivenIteration(Iteration):
    """An iteration whose inputs a test gives."""

    version: int
    effective_key: str
    num_problems: int
    group_size: int
    next_problems: Callable[[int, int], list[Group]]
    given_problems: Callable[[Sequence[Problem], int, Sequence[torch.Tensor] | None], list[Group]]
    present_logprobs: Callable[[Sequence[Group]], list[list[torch.Tensor]]]
    first_logprobs: Callable[[Sequence[Group]], list[list[torch.Tensor]]]
    seeded: Callable[..., Random]
    max_new_tokens: int = 100
    vocab_size: int = 100

    def rollout(self, count: int | None = None, n: int | None = None) -> list[Group]:
        return self.next_problems(self.num_problems if count is None else count, self.group_size if n is None else n)

    def sample(
        self, problems: Sequence[Problem], n: int, prefixes: Sequence[torch.Tensor] | None = None
    ) -> list[Group]:
        return self.given_problems(problems, n, prefixes) if problems else []

    def logprobs(self, groups: Sequence[Group]) -> list[list[torch.Tensor]]:
        return self.present_logprobs(groups)

    def reference_logprobs(self, groups: Sequence[Group]) -> list[list[torch.Tensor]]:
        return self.first_logprobs(groups)

    def random(self, *purpose: object) -> Random:
        return self.seeded(*purpose)


def iteration(version: int, fresh: Sequence[Group] = (), effective_key: str = "score", **changes: Any) -> Iteration:
    """Returns an iteration whose sampler yields the problems of the fresh groups once. It cannot sample others."""
    left = list(fresh)

    def next_problems(count: int, n: int) -> list[Group]:
        taken, left[:] = left[:count], left[count:]
        assert len(taken) == count, f"asked for {count} problems, of which {len(taken)} are left"
        return taken

    def refuse(*asked: Any) -> Any:
        raise AssertionError(f"asked for {asked}")

    def nobody(asked: Sequence[Group]) -> list[list[torch.Tensor]]:
        """Lets a rule ask for the log-probs of an empty list of groups only."""
        assert not asked
        return []

    made = GivenIteration(
        version=version,
        effective_key=effective_key,
        num_problems=len(fresh),
        group_size=len(fresh[0].responses) if fresh else 2,
        next_problems=next_problems,
        given_problems=refuse,
        present_logprobs=nobody,
        first_logprobs=nobody,
        seeded=lambda *purpose: Random(f"{version}/{purpose}"),
    )
    return replace(made, **changes)
