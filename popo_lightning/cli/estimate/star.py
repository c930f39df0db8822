"""STAR: the value of a policy from the reward process that it induces on a few abstract states (2410.02172).

Each token t of a response is in an abstract state z_t, a function of what came before it. A token's weight w_t is the
ratio pi_target / pi_behave of the tokens up to t, or of the last ones among them. Weighted counts give the target's
reward process on these states, and a linear system gives its value:

    M[z, z'] = sum w_t 1[z_t = z, z_t+1 = z'] / sum w_t 1[z_t = z]
    R[z] = sum w_t r_t 1[z_t = z] / sum w_t 1[z_t = z]
    J = eta (I - gamma M)^-1 R,    eta the fraction of responses that begin in z

A response that ends in z leaves the process, so a row of M sums to 1 minus the fraction that ends: the paper's
diag(1 - term) P. With all weights the estimate is consistent for every abstraction. With the time step as the state and
responses of one length it equals the per-decision estimate.

Deviations: the state may not depend on a response's own length, which is unknown at token t, so progress is measured
relative to the longest response of the problem. The paper finds states by k-means; here they have names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from popo_lightning.cli.estimate.names import CONFIDENCE, ONE, POSITION, TIME
from popo_lightning.cli.estimate.trajectories import Trajectories, bounded_exp

States = NDArray[np.int64]
Abstraction = Callable[[Trajectories], States]

BINS = 10
CONFIDENT = -0.5  # mean log-prob in nats per token


def one(logged: Trajectories) -> States:
    """(N, T): a single state."""
    return np.zeros(logged.alive.shape, dtype=np.int64)


def time(logged: Trajectories) -> States:
    """(N, T): the number of the token."""
    return np.broadcast_to(np.arange(logged.alive.shape[1]), logged.alive.shape)


def position(logged: Trajectories) -> States:
    """(N, T): the tenth of the longest response that the token lies in."""
    return time(logged) * BINS // logged.alive.shape[1]


def confidence(logged: Trajectories) -> States:
    """(N, T): the tenth, and whether the tokens before this one have a mean log-prob of at least -0.5 nats.

    The log-probs are the target's, so that the responses of several policies are treated alike.
    """
    before = np.pad(logged.target_logp.cumsum(1), ((0, 0), (1, 0)))[:, :-1]
    mean = before / np.maximum(1, np.arange(before.shape[1]))
    return position(logged) * 2 + (mean >= CONFIDENT)


ABSTRACTIONS: dict[str, Abstraction] = {POSITION: position, CONFIDENCE: confidence, TIME: time, ONE: one}


def star(logged: Trajectories, states: States, last: int = 0, gamma: float = 1.0) -> float:
    """Value of the target; nan if the weights leave a state without an end.

    Args:
        logged: Responses.
        states: (N, T) states from 0; entries after a response's end do not count.
        last: Number of tokens whose ratios make a weight; 0 takes all. Fewer are biased and vary less.
        gamma: Discount per token.
    """
    kinds, places = np.unique(states[logged.alive], return_inverse=True)
    z = np.zeros(states.shape, dtype=np.int64)
    z[logged.alive] = places
    weights = bounded_exp(logged.last_log_ratios(last)) * logged.alive
    continues = logged.alive[:, 1:]
    size = len(kinds)
    visits, rewards, moves = np.zeros(size), np.zeros(size), np.zeros((size, size))
    np.add.at(visits, z, weights)
    np.add.at(rewards, z, weights * logged.rewards)
    np.add.at(moves, (z[:, :-1], z[:, 1:]), weights[:, :-1] * continues)
    seen = np.where(visits > 0, visits, 1.0)
    starts = np.bincount(z[:, 0], minlength=size) / len(z)
    try:
        values = np.linalg.solve(np.eye(size) - gamma * moves / seen[:, None], rewards / seen)
    except np.linalg.LinAlgError:
        return float("nan")
    return float(starts @ values)
