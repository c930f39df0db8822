"""Behaviour weights: the correction from the policy that sampled a token (behave) to the trust region's centre (prox).

A weight never carries gradient. It is w = pi_prox / pi_behave per token; the ratio r = pi_policy / pi_prox belongs to
the trust region, and w * r = pi_policy / pi_behave.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from popo_lightning.errors import SettingError

LOG_RATIO_BOUND = 20.0


def log_ratio(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """log(pi_a / pi_b) per token, 0 at padding, clamped to +-20.

    Padding is cleared first: it may hold -inf, NaN or anything else, and clearing after exp would still send NaN
    through the backward pass. The clamp (verl's) keeps exp finite in float32; beyond it the gradient is 0.

    Args:
        a: (R, T) log-probs, float32.
        b: (R, T) log-probs, float32.
        mask: (R, T), true or 1 at response tokens.

    Returns:
        (R, T), with gradient to `a` and `b`.
    """
    return torch.where(mask.bool(), a - b, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def decoupled_weight(
    prox_logp: Tensor, behave_logp: Tensor, mask: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Weight w = pi_prox / pi_behave per token, truncated from above.

    The weight of decoupled PPO (arXiv 2110.00641; arXiv 2505.24298 for language models), which POPO applies to
    replayed groups (arXiv 2606.01281).

    Deviation: above the cap the weight is lowered to the cap, where AReaL drops the token. `cap=None` means without
    truncation; the weight itself is always there.

    Args:
        prox_logp: (R, T).
        behave_logp: (R, T).
        mask: (R, T).
        cap: Upper bound of the weight, or None.

    Returns:
        (weight, raw), both (R, T) and detached, 1 at padding; `raw` is the weight before the cap.
    """
    raw = log_ratio(prox_logp.detach(), behave_logp.detach(), mask).exp()
    return (raw if cap is None else raw.clamp(max=cap)), raw


class BehaveWeight(ABC):
    """Slot: how the loss of a token is corrected for the policy that sampled it."""

    @abstractmethod
    def __call__(self, prox_logp: Tensor, behave_logp: Tensor, fresh: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Give (weight, raw), both (R, T) and detached; `raw` is pi_prox / pi_behave before any rule, for the log.

        `prox_logp`, `behave_logp` and `mask` are (R, T); `fresh` (R,) is true for rows sampled this iteration.
        """


class Decoupled(BehaveWeight):
    """POPO's weight pi_prox / pi_behave on replayed rows, and 1 on rows sampled this iteration.

    A fresh row's behave policy is prox by definition; what a recomputation would show there is the numerical
    difference between engine and trainer, which stays visible in `raw`.

    Args:
        cap: Upper bound of a token's weight, null for none (the weight is applied either way).
        correct_fresh: Weigh fresh rows as well, so that the weight also corrects the engine's numerics.
    """

    def __init__(self, cap: float | None = 5.0, correct_fresh: bool = False) -> None:
        if cap is not None and not cap >= 1:
            raise SettingError(
                f"Decoupled.cap is {cap}; it must be at least 1, the weight of an on-policy token, or null for no cap."
            )
        self.cap = cap
        self.correct_fresh = correct_fresh

    def __call__(self, prox_logp: Tensor, behave_logp: Tensor, fresh: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Give (weight, raw), both (R, T) and detached; `raw` keeps the fresh rows and ignores the cap."""
        weight, raw = decoupled_weight(prox_logp, behave_logp, mask, self.cap)
        if not self.correct_fresh:
            weight = torch.where(fresh.bool().unsqueeze(-1), 1.0, weight)
        return weight, raw


class One(BehaveWeight):
    """No correction: replayed rows pass as if prox had sampled them (POPO's ablation pi_old, arXiv 2606.01281)."""

    def __call__(self, prox_logp: Tensor, behave_logp: Tensor, fresh: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Give (ones, pi_prox / pi_behave), both (R, T) and detached."""
        _, raw = decoupled_weight(prox_logp, behave_logp, mask)
        return torch.ones_like(raw), raw
