"""Trust regions: how far from the center a token may push the policy. Here are the slot, PPO's clip, and no region."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from popo_lightning.core.bounds import above, positive_share
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.objectives.inputs import MinibatchTokens, ObjectiveInputs, log_ratio, sampled_logp


class TrustRegionOutput(NamedTuple):
    """Per-token (R, T) tensors. `loss` carries gradient; padding has loss 0, ratio 1 and is not clipped.

    `clipped` is true where a bound is active. The token then has no gradient, or a bounded one if the class says so.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None = None,
) -> TrustRegionOutput:
    """PPO's surrogate as a loss, for any kind of ratio r: max(-r A, -clamp(r, 1 - clip_low, 1 + clip_high) A).

    arXiv 1707.06347 equation 7; two bounds: arXiv 2503.14476 (DAPO); `dual_clip` c bounds the loss of A < 0 by -c A
    (arXiv 1912.09729).

    Args:
        ratio: (R, T) ratios, with gradient; 1 at padding.
        advantages: (R, T) or (R, 1) advantages.
        mask: (R, T), true at response tokens.
        clip_low: Distance of the lower bound below 1, one for all or (R, T).
        clip_high: Distance of the upper bound above 1, one for all or (R, T).
        dual_clip: The bound c, or None.

    Returns:
        Loss, ratio, and which tokens get no gradient because a bound is the loss.
    """
    advantages = torch.where(mask.bool(), advantages, 0.0)
    low, high = (torch.as_tensor(b, dtype=ratio.dtype, device=ratio.device) for b in (clip_low, clip_high))
    unclipped = -ratio * advantages
    bounded = -ratio.clamp(1 - low, 1 + high) * advantages
    loss = torch.maximum(unclipped, bounded)
    clipped = bounded > unclipped
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        over = (advantages < 0) & (loss > ceiling)
        loss = torch.where(over, ceiling, loss)
        clipped = clipped | over
    return TrustRegionOutput(loss, ratio, clipped)


def score_loss(logp: Tensor, coefficient: Tensor, mask: Tensor) -> Tensor:
    """Returns REINFORCE's loss -coefficient * log pi, (R, T), 0 at padding. The coefficient must have no gradient."""
    return -torch.where(mask.bool(), coefficient, 0.0) * torch.where(mask.bool(), logp, 0.0)


def capped_score_loss(
    logp: Tensor, center_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> TrustRegionOutput:
    """Computes -sg[clamp(r, low, high)] A log pi with r = pi_policy / pi_center.

    Inside the bounds the gradient is that of -r A. Outside it is limited, but not 0 as in PPO.

    Args:
        logp: (R, T) log-probs under the policy, with gradient.
        center_logp: (R, T) log-probs under the center.
        advantages: (R, T) or (R, 1) advantages.
        mask: (R, T), true at response tokens.
        low: Lower bound of the ratio.
        high: Upper bound of the ratio.

    Returns:
        Loss, detached ratio, and which tokens have a clamped ratio.
    """
    mask = mask.bool()
    ratio = log_ratio(logp.detach(), center_logp.detach(), mask).exp()
    capped = ratio.clamp(low, high)
    advantages = torch.where(mask, advantages, 0.0)
    return TrustRegionOutput(score_loss(logp, capped * advantages, mask), ratio, capped != ratio)


class TrustRegion(KeepsState, ABC):
    """Slot: how far a token may push the policy.

    Attributes:
        needs_minibatch_tokens: Whether `for_minibatch` must be called before a minibatch's first row, which costs a
            forward pass without gradient.
        includes_is_weight: Whether the behavior weight must be NoCorrection, because the ratio is
            pi_policy / pi_behave, so that a weight would correct twice, or because the rule needs none.
        compares_pairs: Whether each group is a pair, and a row's loss needs the log-ratio of the other row (`rival`).
            `log_ratios` and `for_pairs` are then called before a minibatch's first row.
        needs_reference: Whether `ref_logp` must be given, which costs a forward pass of the reference policy.
    """

    needs_minibatch_tokens: bool = False
    includes_is_weight: bool = False
    compares_pairs: bool = False
    needs_reference: bool = False

    def for_minibatch(self, tokens: MinibatchTokens) -> TrustRegion:
        """Returns the region for all micro-batches of a minibatch; itself if it does not depend on the tokens."""
        return self

    def log_ratios(self, rows: ObjectiveInputs) -> Tensor:
        """Returns (R, 1) log-ratios, from which each row gets its `rival`, for a rule that compares pairs."""
        raise NotImplementedError(f"{type(self).__name__} compares no pairs")

    def for_pairs(self, margins: Tensor) -> TrustRegion:
        """Returns the region for a minibatch with these margins (P,) of pairs; itself if it does not depend on them."""
        return self

    def report(self) -> dict[str, float]:
        """Returns numbers for the log, such as the bounds found for the minibatch."""
        return {}

    @abstractmethod
    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Returns the loss per token without the behavior weight, which the objective multiplies.

        `weight` is that weight, (R, T) and detached, for regions whose width depends on it.
        """


class PPOClip(TrustRegion):
    """PPO's clip around prox with separate bounds and a dual clip: `clipped_surrogate` of r = pi_policy / pi_prox.

    Fresh and replayed tokens share the center prox in POPO (arXiv 2606.01281).

    Deviation: r comes from a log-ratio clamped to +-20; `clipped` does not count the tokens that clamp stops.

    Args:
        clip_low: Ratios below 1 - clip_low give no further gain; 1 for no lower bound.
        clip_high: Ratios above 1 + clip_high give no further gain.
        dual_clip: Upper bound of the ratio for negative advantages; null for none.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 10.0) -> None:
        name = type(self).__name__
        self.clip_low = positive_share(f"{name}.clip_low", clip_low, "0.2")
        self.clip_high = above(f"{name}.clip_high", clip_high, 0, "0.2")
        self.dual_clip = checked_dual_clip(name, dual_clip)

    def center(self, rows: ObjectiveInputs) -> Tensor:
        """Returns the log-probs (R, T) under the policy at the center."""
        return rows.prox_logp

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Applies `clipped_surrogate` with these settings."""
        ratio = log_ratio(rows.logp, self.center(rows).detach(), rows.mask).exp()
        return clipped_surrogate(ratio, rows.advantages, rows.mask, self.clip_low, self.clip_high, self.dual_clip)


@dataclass(eq=False)
class FixedClip(PPOClip):
    """PPO's clip with bounds that were computed for one minibatch, not set by a user.

    Args:
        clip_low: Distance of the lower bound below 1.
        clip_high: Distance of the upper bound above 1; infinite for none.
        dual_clip: Upper bound of the ratio for negative advantages, or None.
        found: Numbers for the log.
        around_behave: Whether the center is behave instead of prox.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None
    found: dict[str, float]
    around_behave: bool = False

    def center(self, rows: ObjectiveInputs) -> Tensor:
        """Returns the log-probs (R, T) under the policy at the center."""
        return sampled_logp(rows) if self.around_behave else rows.prox_logp

    def report(self) -> dict[str, float]:
        """Returns the bounds and the numbers that led to them, without infinite ones."""
        numbers = {"clip_low": self.clip_low, "clip_high": self.clip_high, **self.found}
        return {name: value for name, value in numbers.items() if value < math.inf}


class Unbounded(TrustRegion):
    """No trust region: REINFORCE (RLOO, arXiv 2402.14740; OPMD, arXiv 2509.24203).

    The loss is -r A with r = pi_policy / pi_prox, whose gradient is unbiased for the tokens of prox. Without
    ``weighted`` it is -A log pi, which ignores which policy sampled them. Stored: nothing. Extra passes: none. Nothing
    is clipped.

    Deviation: the log-ratio is clamped to +-20.

    Args:
        weighted: Multiply by the ratio to prox. The two losses differ from an iteration's second minibatch on.
    """

    def __init__(self, weighted: bool = True) -> None:
        self.weighted = weighted

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Returns -r A, or -A log pi."""
        mask = rows.mask.bool()
        ratio = log_ratio(rows.logp, rows.prox_logp.detach(), mask).exp()
        advantages = torch.where(mask, rows.advantages, 0.0)
        loss = -ratio * advantages if self.weighted else score_loss(rows.logp, advantages, mask)
        return TrustRegionOutput(loss, ratio, torch.zeros_like(mask))


def checked_dual_clip(owner: str, dual_clip: float | None) -> float | None:
    """Returns the dual clip, or raises SettingError if it cannot work."""
    return None if dual_clip is None else above(f"{owner}.dual_clip", dual_clip, 1, "10, or null for none")
