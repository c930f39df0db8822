"""Whether a response without advantage can move the policy at all: if not, its backward pass is not computed."""

from __future__ import annotations

import copy

import torch

from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective

ROWS, TOKENS = 8, 32


def moves_by_advantage_alone(objective: Objective, version: int) -> bool:
    """Whether an objective gives tokens whose advantage is 0 a gradient of exactly 0.

    It is tried, and not declared, so that a rule that somebody adds is judged by what it does: on random tokens, near
    the policies that they are compared with and far from them, of fresh and of stored rows, without and with a gradient
    of the entropy and a reference.

    Args:
        objective: For the minibatch. It is left as it was.
        version: Policy version at the start of the iteration: a regularizer may begin at some.
    """
    logp, rows = _tokens_without_advantage(version)
    with torch.enable_grad():
        loss, _ = copy.deepcopy(objective)(rows, 1.0)
        if not loss.requires_grad:
            return True
        (gradient,) = torch.autograd.grad(loss, logp, allow_unused=True)
    return gradient is None or not bool(gradient.any())  # NaN counts as a gradient


def _tokens_without_advantage(version: int) -> tuple[torch.Tensor, ObjectiveInputs]:
    """((R, T) log-probs with a gradient, what an objective is given of them)."""
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
    )
    return logp, rows
