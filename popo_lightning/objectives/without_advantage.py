"""Tests whether a response without advantage can move the policy. If not, its backward pass is skipped."""

from __future__ import annotations

import copy
from typing import Any

import torch

from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective

ROWS, TOKENS = 8, 32


class _Drawn(dict[str, torch.Tensor]):
    """Has any extra quantity that a rule asks for, (R, T) random numbers, since the trial cannot know the names."""

    def __init__(self, draw: torch.Generator) -> None:
        self._draw = draw

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]

    def __missing__(self, name: str) -> torch.Tensor:
        return self.setdefault(name, -torch.randn(ROWS, TOKENS, generator=self._draw).abs())


def moves_by_advantage_alone(objective: Objective, version: int) -> bool:
    """Returns whether an objective gives tokens whose advantage is 0 a gradient of exactly 0.

    The objective is tried instead of asked, so that foreign rules are judged by what they do. The trial has random
    tokens of fresh and stored rows, near to and far from the policies they are compared with, with a gradient of the
    entropy and a reference.

    Args:
        objective: Objective for the minibatch. It is not changed.
        version: Policy version at the start of the iteration, because a regularizer may begin at some version.
    """
    logp, rows = _tokens_without_advantage(version)
    with torch.enable_grad():
        try:
            loss, _ = copy.deepcopy(objective)(rows, 1.0)
        except Exception:  # a foreign rule may need extra quantities of another kind
            return False
        if not loss.requires_grad:
            return True
        (gradient,) = torch.autograd.grad(loss, logp, allow_unused=True)
    return gradient is None or not bool(gradient.any())  # NaN counts as a gradient


def _tokens_without_advantage(version: int) -> tuple[torch.Tensor, ObjectiveInputs]:
    """Returns (R, T) log-probs that require gradients, and an objective's inputs with them."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    logp = -normal(ROWS, TOKENS).abs()
    distance = normal(ROWS, 1).exp()  # from a few hundredths to several nats
    prox, behave, ref = (logp + distance * normal(ROWS, TOKENS) for _ in range(3))
    logp.requires_grad_()
    rows = ObjectiveInputs(
        logp=logp,
        prox_logp=prox,
        behave_logp=behave,
        advantages=torch.zeros(ROWS, 1),
        mask=torch.ones(ROWS, TOKENS, dtype=torch.bool),
        fresh=torch.arange(ROWS) % 2 == 0,
        entropy=1 - logp,  # any number that has a gradient
        ref_logp=ref,
        version=version,
        loss_weight=torch.ones(ROWS),
        rival=normal(ROWS, 1),
        values=normal(ROWS, TOKENS),
        returns=normal(ROWS, TOKENS),
        target_values=normal(ROWS, TOKENS),
        value_std=normal(ROWS, TOKENS).abs(),
        problem_group=torch.arange(ROWS)[:, None] % 2 - 1.0,
        extra=_Drawn(draw),
    )
    return logp, rows
