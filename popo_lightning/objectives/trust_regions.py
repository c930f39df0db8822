"""Trust regions: how far from prox a token may push the policy."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from popo_lightning.errors import SettingError
from popo_lightning.objectives.weights import log_ratio


class TrustRegionOutput(NamedTuple):
    """Per token, all (R, T): `loss` carries gradient; padding has loss 0, ratio 1 and is not clipped."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def ppo_clip(
    logp: Tensor,
    prox_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TrustRegionOutput:
    """PPO's clipped surrogate as a loss: max(-r A, -clamp(r, 1 - clip_low, 1 + clip_high) A), r = pi_policy / pi_prox.

    arXiv 1707.06347 equation 7; two bounds: arXiv 2503.14476 (DAPO); `dual_clip` c bounds the loss of A < 0 by -c A
    (arXiv 1912.09729). Fresh and replayed tokens share the centre prox (POPO, arXiv 2606.01281).

    Deviation: r comes from a log-ratio clamped to +-20; `clipped` does not count the tokens that clamp stops.

    Args:
        logp: (R, T), with gradient.
        prox_logp: (R, T), treated as a constant, so `logp` itself may be passed when no step was taken yet.
        advantages: (R, T) or (R, 1).
        mask: (R, T).
        clip_low: Distance below 1.
        clip_high: Distance above 1.
        dual_clip: c, or None.

    Returns:
        Loss, ratio, and which tokens get no gradient because a bound is the loss.
    """
    mask = mask.bool()
    ratio = log_ratio(logp, prox_logp.detach(), mask).exp()
    advantages = torch.where(mask, advantages, 0.0)
    unclipped = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(unclipped, bounded)
    clipped = bounded > unclipped
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        over = (advantages < 0) & (loss > ceiling)
        loss = torch.where(over, ceiling, loss)
        clipped = clipped | over
    return TrustRegionOutput(loss, ratio, clipped)


class TrustRegion(ABC):
    """Slot: how the ratio to prox is bounded."""

    @abstractmethod
    def __call__(self, logp: Tensor, prox_logp: Tensor, advantages: Tensor, mask: Tensor) -> TrustRegionOutput:
        """Map (R, T) tensors (advantages may be (R, 1)) to the loss per token before the behaviour weight."""


class PPOClip(TrustRegion):
    """PPO's clip around prox with separate bounds and a dual clip.

    Args:
        clip_low: The ratio gives no more gain below 1 - clip_low.
        clip_high: The ratio gives no more gain above 1 + clip_high.
        dual_clip: Bound of the ratio where the advantage is negative, null for none.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 10.0) -> None:
        for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
            if not 0 < value < math.inf:
                raise SettingError(f"PPOClip.{name} is {value}; it must be a finite number above 0, such as 0.2.")
        if dual_clip is not None and not 1 < dual_clip < math.inf:
            raise SettingError(
                f"PPOClip.dual_clip is {dual_clip}; it must be a finite number above 1, such as 10, or null for none."
            )
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip

    def __call__(self, logp: Tensor, prox_logp: Tensor, advantages: Tensor, mask: Tensor) -> TrustRegionOutput:
        """Apply `ppo_clip` with these settings."""
        return ppo_clip(logp, prox_logp, advantages, mask, self.clip_low, self.clip_high, self.dual_clip)
