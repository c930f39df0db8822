"""The value of a policy from another's responses to one problem: pure functions of arrays.

All weights are self-normalized within the problem, except in the doubly robust estimate. A response has the
log-weight l, the sum over its tokens of log(pi_target / pi_behave):

| estimator | weights | bias |
| --- | --- | --- |
| importance sampling | exp(l) | vanishes with the number of responses |
| per-decision | exp(l up to token t), normalized at each t (Precup et al., 2000) | vanishes |
| clipped | min(exp(l), largest) | towards the responses' own policy |
| geometric | exp(l / tokens) | biased: no estimate of the target's value, but of a policy between the two |
| doubly robust | b + exp(l) (r - b), b the mean of the other responses (Jiang and Li, 1511.03722) | none |
"""

from __future__ import annotations

import numpy as np

from popo_lightning.cli.estimate.names import LARGEST_WEIGHT
from popo_lightning.cli.estimate.trajectories import Trajectories, bounded_exp
from popo_lightning.metrics.effective import normalized

LARGEST_LOG_WEIGHT = 50.0  # bound of the doubly robust estimate, whose weights are not normalized


def sampled_mean(logged: Trajectories) -> float:
    """Mean return of the responses, and so the value of the policy that sampled them."""
    return float(logged.returns.mean())


def importance_sampling(logged: Trajectories) -> float:
    """Sum w r / sum w, with w = pi_target / pi_behave of the whole response."""
    return float(normalized(logged.log_weights) @ logged.returns)


def per_decision(logged: Trajectories, gamma: float = 1.0) -> float:
    """Sum over t of gamma^t (sum w_t r_t / sum w_t); a response that has ended keeps its last weight.

    Args:
        logged: Responses.
        gamma: Discount per token.
    """
    weights = bounded_exp(logged.last_log_ratios(), axis=0)
    at_step = (weights * logged.rewards).sum(0) / weights.sum(0)
    return float(at_step @ gamma ** np.arange(len(at_step)))


def clipped(logged: Trajectories, largest: float = LARGEST_WEIGHT) -> float:
    """Like importance_sampling, with weights of at most ``largest``; biased towards the mean of the responses."""
    return float(normalized(np.minimum(logged.log_weights, np.log(largest))) @ logged.returns)


def geometric(logged: Trajectories) -> float:
    """Weights a response by the geometric mean of its token ratios; biased for any number of responses."""
    return float(normalized(logged.log_weights / logged.lengths) @ logged.returns)


def doubly_robust(logged: Trajectories) -> float:
    """Mean of b_i + w_i (r_i - b_i); b_i is the mean return of the other responses, or 0 if there is none.

    A baseline that includes response i would be biased. The value may lie outside the range of the rewards.
    """
    returns, n = logged.returns, len(logged.returns)
    others = (returns.sum() - returns) / max(1, n - 1)
    weights = np.exp(np.clip(logged.log_weights, -LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT))
    return float(np.mean(others + weights * (returns - others)))
