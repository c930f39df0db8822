"""Groups made by hand, for the tests of what is done with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from popo_lightning.groups import Group, Response
from popo_lightning.problems import Problem


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
