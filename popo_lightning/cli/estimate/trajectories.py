"""The logged responses of one problem as padded arrays, which every estimator takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from popo_lightning.metrics.effective import Floats

ORDINARY = 300.0  # largest log-weight whose sums cannot overflow


@dataclass(frozen=True)
class Trajectories:
    """N responses of at most T tokens.

    Args:
        log_ratios: (N, T) log(pi_target / pi_behave) of each token; 0 after the end.
        rewards: (N, T) reward that follows each token; 0 after the end.
        alive: (N, T) bool, whether the response has this token. Each response has its first token.
        target_logp: (N, T) log-prob of each token under the target, for abstractions that use it; 0 after the end.
    """

    log_ratios: Floats
    rewards: Floats
    alive: NDArray[np.bool_]
    target_logp: Floats

    def __post_init__(self) -> None:
        shapes = {a.shape for a in (self.log_ratios, self.rewards, self.alive, self.target_logp)}
        if len(shapes) != 1 or self.alive.ndim != 2 or not self.alive.size or not self.alive[:, 0].all():
            raise ValueError(f"trajectories need (N, T) arrays of one shape, with a first token each, got {shapes}")
        if not np.isfinite(self.log_ratios).all() or not np.isfinite(self.rewards).all():
            raise ValueError("log-ratios and rewards of trajectories must be finite")

    @property
    def log_weights(self) -> Floats:
        """(N,) log(pi_target / pi_behave) of whole responses."""
        total: Floats = self.log_ratios.sum(1)
        return total

    @property
    def returns(self) -> Floats:
        """(N,) summed rewards."""
        total: Floats = self.rewards.sum(1)
        return total

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) number of tokens."""
        counted: NDArray[np.int64] = self.alive.sum(1)
        return counted

    def last_log_ratios(self, last: int = 0) -> Floats:
        """(N, T) log-weights up to and including each token: of the last tokens only, or of all.

        Args:
            last: Number of tokens; 0 takes all.
        """
        summed: Floats = self.log_ratios.cumsum(1)
        if last and last < summed.shape[1]:
            summed = summed - np.pad(summed, ((0, 0), (last, 0)))[:, : summed.shape[1]]
        return summed


def bounded_exp(log_weights: Floats, axis: int | None = None) -> Floats:
    """Weights up to a factor that cancels in a quotient of their sums, so that no sum overflows.

    The factor is 1 for weights of ordinary size, so that estimators that are equal on paper agree in their last bits.

    Args:
        log_weights: Log-weights of any shape.
        axis: Axis along which the weights share a factor; None shares it among all.
    """
    if np.abs(log_weights).max() > ORDINARY:
        log_weights = log_weights - log_weights.max(axis, keepdims=True)
    weights: Floats = np.exp(log_weights)
    return weights


def graded_responses(
    target_logp: Sequence[Floats], behave_logp: Sequence[Floats], rewards: Sequence[float]
) -> Trajectories:
    """Makes trajectories of responses that have one reward, at their end.

    Args:
        target_logp: (T,) log-probs of each response under the policy that is judged. A response without tokens gets one
            token that has probability 1 under both policies.
        behave_logp: (T,) log-probs of each response under the policy that sampled it.
        rewards: One per response.
    """
    lengths = np.array([max(1, len(logp)) for logp in target_logp])
    alive = np.arange(lengths.max()) < lengths[:, None]
    target, behave = np.zeros(alive.shape), np.zeros(alive.shape)
    for place, (of_target, of_behave) in enumerate(zip(target_logp, behave_logp, strict=True)):
        target[place, : len(of_target)] = of_target
        behave[place, : len(of_behave)] = of_behave
    at_end = np.zeros(alive.shape)
    at_end[np.arange(len(lengths)), lengths - 1] = rewards
    return Trajectories(target - behave, at_end, alive, target)
