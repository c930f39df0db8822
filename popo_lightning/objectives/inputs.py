"""The inputs of an objective's rules: the rows of a micro-batch, or the tokens of a whole minibatch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0


@dataclass
class ObjectiveInputs:
    """R responses of T right-padded tokens. Log-probs are float32, taken at the sampling temperature.

    Args:
        logp: (R, T) log-probs under the policy, with gradient.
        prox_logp: (R, T) log-probs under prox, the center of the trust region.
        behave_logp: (R, T) log-probs under behave, the policy that sampled the tokens, stored at generation.
        advantages: (R, 1) or (R, T) advantages.
        mask: (R, T), true at response tokens; other positions may hold any value.
        fresh: (R,), true if the row was sampled this iteration.
        entropy: (R, T) entropy of the next-token distributions, with gradient if a regularizer uses it.
        ref_logp: (R, T) log-probs under the frozen reference.
        version: Policy version at the start of the iteration, for schedules.
        loss_weight: (R,) factors of each row's loss, regularizers excluded; None for 1.
        values: (R, T) a critic's values before the step.
        returns: (R, T) target returns of the critic.
        target_values: (R, T) values of a critic's target copy.
        value_std: (R, T) standard deviations of the return, from a critic that learns them.
        problem_group: (R, 1) index of the problem's group, for a nested critic; -1 for none.
        rival: (R, 1) log-ratio of the other response of a pair, summed over its tokens, under the policy before the
            step.
        extra: (R, 1) or (R, T) further quantities, float32, by the names under which a rule of a user's own has put
            them into ``Minibatch.extra``.
    """

    logp: Tensor
    prox_logp: Tensor
    behave_logp: Tensor
    advantages: Tensor
    mask: Tensor
    fresh: Tensor
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    version: int = 0
    loss_weight: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    target_values: Tensor | None = None
    value_std: Tensor | None = None
    problem_group: Tensor | None = None
    rival: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class MinibatchTokens:
    """All N response tokens of a minibatch, over its micro-batches and ranks: flat (N,) detached tensors.

    Args:
        logp: (N,) log-probs under the policy before the minibatch's step.
        prox_logp: (N,) log-probs under prox.
        behave_logp: (N,) log-probs under behave.
        advantages: (N,) advantages.
        fresh: (N,), true at tokens of rows sampled this iteration.
    """

    logp: Tensor
    prox_logp: Tensor
    behave_logp: Tensor
    advantages: Tensor
    fresh: Tensor


def sampled_logp(rows: ObjectiveInputs) -> Tensor:
    """Returns the log-probs (R, T) under the policy that sampled: behave on replayed rows, prox on fresh ones.

    prox sampled the fresh rows. The engine's log-probs of them differ from prox's by rounding, which must not fill the
    trust region. Behavior weights treat fresh rows alike.
    """
    return torch.where(rows.fresh.bool().unsqueeze(-1), rows.prox_logp, rows.behave_logp).detach()


def sampled_tokens(tokens: MinibatchTokens) -> Tensor:
    """Returns the log-probs (N,) of `sampled_logp` for the tokens of a minibatch."""
    return torch.where(tokens.fresh.bool(), tokens.prox_logp, tokens.behave_logp)


def log_ratio(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Returns log(pi_a / pi_b) per token, 0 at padding, clamped to +-20.

    Padding may hold -inf or NaN. It is cleared first, because clearing it after exp would still send NaN through the
    backward pass. The clamp (verl's) keeps exp finite in float32; beyond it the gradient is 0.

    Args:
        a: (R, T) log-probs, float32.
        b: (R, T) log-probs, float32.
        mask: (R, T), true or 1 at response tokens.

    Returns:
        (R, T) log-ratios, with gradient to `a` and `b`.
    """
    return torch.where(mask.bool(), a - b, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def sequence_log_ratio(logp: Tensor, center_logp: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of log(pi_policy / pi_center) over a response's tokens, with gradient: (R, T) to (R, 1).

    It is the log of the ratios' geometric mean, and 0 for a row without tokens.
    """
    logs = log_ratio(logp, center_logp.detach(), mask)
    return logs.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
