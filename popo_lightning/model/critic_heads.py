"""Forms of a critic's output for a state: a number, the return's mean and standard deviation, or its distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softplus

from popo_lightning.core.bounds import above, at_least, finite, within
from popo_lightning.core.errors import SettingError

STD_BIAS, MIN_SCALE, MAX_SCALE = 0.1, 0.1, 10.0  # the source's constants in gaussian_losses
SUPPORT_TOLERANCE = 1e-3  # fraction of the atoms' range by which a return may lie outside, for rounding


class ValueHead(ABC):
    """Slot: the form of a critic's output for each state.

    Attributes:
        width: Number of outputs for each state, O.
        bounds_movement: Whether `model.critic.value_clip` applies.
        groups: Groups of problems with their own part of the head; none unless the head is nested.
        sigma_floor: Minimum standard deviation that advantages are divided by; None leaves them unchanged.
        running_rate: Weight of a step's mean standard deviation in the running one.
    """

    width: int = 1
    bounds_movement: bool = False
    groups: tuple[str, ...] = ()
    sigma_floor: float | None = None
    running_rate: float = 0.0

    @abstractmethod
    def value(self, out: Tensor) -> Tensor:
        """Returns the expected return (...) for outputs (..., O)."""

    def std(self, out: Tensor) -> Tensor | None:
        """Returns the return's standard deviation (...) for outputs (..., O); None if the head does not learn it."""
        return None

    @abstractmethod
    def losses(self, out: Tensor, returns: Tensor, running_std: Tensor | None) -> Tensor:
        """Returns the losses (...) of states, of one head.

        Padding has outputs and returns of 0. Its losses are left out, but they and their gradients must be finite.

        Args:
            out: (..., O) outputs, with gradient.
            returns: (...) target returns.
            running_std: () running mean of :meth:`std` over the steps; None for a head without it.
        """

    def shape_gradients(self, value_model: nn.Module, iteration: int) -> None:  # noqa: B027  # most need none
        """Changes the gradients of a step before they are clipped.

        Args:
            value_model: Value model with this head.
            iteration: Iteration of the step, counted from 0.
        """

    def check_returns(self, low: float, high: float) -> None:  # noqa: B027
        """Raises SettingError for returns that the head cannot express.

        Args:
            low: Smallest return of a minibatch.
            high: Largest return of a minibatch.
        """

    def group_of(self, info: Mapping[str, Any]) -> int:
        """Returns the index of a problem's group in :attr:`groups`; -1 for none of them.

        Args:
            info: Info of the problem.
        """
        return -1


class ScalarHead(ValueHead):
    """Learns only the expected return, by squared error (PPO, 1707.06347)."""

    bounds_movement = True

    def value(self, out: Tensor) -> Tensor:
        """Returns the output itself."""
        return out[..., 0]

    def losses(self, out: Tensor, returns: Tensor, running_std: Tensor | None) -> Tensor:
        """Returns half the squared errors."""
        return 0.5 * (out[..., 0] - returns) ** 2


class GaussianHead(ValueHead):
    """Learns mean and standard deviation of the return: the critic of DSAC-T (2310.05858; Jingliang-Duan/DSAC-v2).

    The mean learns the return, the standard deviation its clipped squared error, and the loss is scaled by the variance
    (:func:`gaussian_losses`). With `sigma_floor` advantages become A / max(sigma, floor). This gives each state its own
    unit, and replaces whitening.

    Deviations: one lambda-return serves both targets, because returns here are sampled rewards and not draws from a
    target's distribution. The source takes half of the squared error for the standard deviation's target, so its sigma
    is the standard deviation over sqrt(2); here it is the standard deviation. Its Huber bound of 50 is left out, since
    rewards are far below it. Its running mean moves by 0.005 a step, for some million steps.

    Args:
        clip_sigmas: Bound of the error that the standard deviation learns, in running standard deviations; null for no
            bound. A bound makes the standard deviation too small where returns are rare.
        sigma_floor: Divide advantages by the standard deviation, and at least by this; null leaves them unchanged.
        running_rate: Weight of a minibatch's mean standard deviation in the running one.
    """

    width = 2

    def __init__(
        self, clip_sigmas: float | None = 3.0, sigma_floor: float | None = None, running_rate: float = 0.05
    ) -> None:
        self.clip_sigmas = None if clip_sigmas is None else above("GaussianHead.clip_sigmas", clip_sigmas, 0, "3.0")
        self.sigma_floor = None if sigma_floor is None else above("GaussianHead.sigma_floor", sigma_floor, 0, "0.05")
        self.running_rate = within("GaussianHead.running_rate", running_rate, 0, 1, "0.05")

    def value(self, out: Tensor) -> Tensor:
        """Returns the mean."""
        return out[..., 0]

    def std(self, out: Tensor) -> Tensor:
        """Returns log(1 + e^output), which is log 2 at the start."""
        return softplus(out[..., 1])

    def losses(self, out: Tensor, returns: Tensor, running_std: Tensor | None) -> Tensor:
        """Returns :func:`gaussian_losses`."""
        assert running_std is not None
        return gaussian_losses(self.value(out), self.std(out), returns, running_std, self.clip_sigmas)


def gaussian_losses(
    mean: Tensor, std: Tensor, returns: Tensor, running_std: Tensor, clip_sigmas: float | None
) -> Tensor:
    """Returns losses of a Gaussian's mean and standard deviation (DSAC-T, 2310.05858, with the full squared error).

        omega [ (mean - R)^2 / 2 + std sg((std^2 - e^2) / (std + 0.1)) ],  e = clip(R - sg(mean), +-c b),
        omega = clip(b^2 / (sg(std)^2 + 0.1), 0.1, 10)

    with sg for a detached term. Without the clip the minimum is at the mean and the standard deviation of R.

    Args:
        mean: (...) means, with gradient.
        std: (...) standard deviations, with gradient.
        returns: (...) target returns R.
        running_std: () running standard deviation b.
        clip_sigmas: Bound c, or None.
    """
    known = std.detach()
    error = returns - mean.detach()
    if clip_sigmas is not None:
        bound = clip_sigmas * running_std
        error = torch.minimum(torch.maximum(error, -bound), bound)
    scale = (running_std**2 / (known**2 + STD_BIAS)).clamp(MIN_SCALE, MAX_SCALE)
    return scale * (0.5 * (mean - returns) ** 2 + std * (known**2 - error**2) / (known + STD_BIAS))


class CategoricalHead(ValueHead):
    """Learns a distribution of the return over equally spaced atoms, by cross-entropy (C51, 1707.06887).

    The defaults are those of verifiable rewards, which are in [0, 1]. FastTD3 (2505.22642) has 101 atoms. A return
    outside the atoms is refused, not clamped.

    Deviation: the target is the lambda-return's own pair of atoms, so at lam below 1 later values enter by their mean
    and not by their distribution.

    Args:
        atoms: Number of atoms, 2 or more.
        low: Return of the first atom.
        high: Return of the last atom.
    """

    def __init__(self, atoms: int = 51, low: float = 0.0, high: float = 1.0) -> None:
        self.width = at_least("CategoricalHead.atoms", atoms, 2, ", such as 51")
        self.low = finite("CategoricalHead.low", low, "0.0")
        self.high = above("CategoricalHead.high", high, low, f"{low + 1:g}")

    def value(self, out: Tensor) -> Tensor:
        """Returns the mean of the distribution."""
        support = torch.linspace(self.low, self.high, self.width, device=out.device)
        return (out.softmax(dim=-1) * support).sum(dim=-1)

    def losses(self, out: Tensor, returns: Tensor, running_std: Tensor | None) -> Tensor:
        """Returns the cross-entropy with the return's pair of atoms."""
        target = projected(returns[..., None], torch.ones_like(returns)[..., None], self.low, self.high, self.width)
        return -(target * log_softmax(out, dim=-1)).sum(dim=-1)

    def check_returns(self, low: float, high: float) -> None:
        """Raises SettingError for returns outside the atoms' range."""
        slack = SUPPORT_TOLERANCE * (self.high - self.low)
        if not self.low - slack <= low <= high <= self.high + slack:
            raise SettingError(
                f"model.critic.head is CategoricalHead from {self.low:g} to {self.high:g}, but returns are from "
                f"{low:g} to {high:g}; set its low and high to bounds of what model.reward_key can give"
            )


def projected(returns: Tensor, probabilities: Tensor, low: float, high: float, atoms: int) -> Tensor:
    """Projects a discrete distribution onto equally spaced atoms with the same mean (C51, 1707.06887, algorithm 1).

    Each return splits its probability between its two neighboring atoms by its distance from them. A return on an
    atom, or outside their range, gives all to the nearest atom.

    Args:
        returns: (..., M) returns.
        probabilities: (..., M) their probabilities, whose sum is 1.
        low: Return of the first atom.
        high: Return of the last atom.
        atoms: Number of atoms, A.

    Returns:
        (..., A) probabilities of the atoms.
    """
    place = (returns.clamp(low, high) - low) * ((atoms - 1) / (high - low))
    distance = (place[..., None, :] - torch.arange(atoms, device=returns.device)[:, None]).abs()
    return ((1 - distance).clamp(min=0) * probabilities[..., None, :]).sum(dim=-1)
