"""Behavior weights: correct from the policy that sampled a token (behave) to the trust region's center (prox).

A weight never carries gradient. It is a function of w = pi_prox / pi_behave per token. The ratio r = pi_policy /
pi_prox belongs to the trust region, and w * r = pi_policy / pi_behave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from popo_lightning.core.bounds import held, one_of, within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.objectives.inputs import LOG_RATIO_BOUND, ObjectiveInputs, log_ratio

SequenceRatio = Literal["product", "geometric_mean"]


def decoupled_weight(rows: ObjectiveInputs) -> Tensor:
    """Returns the weight w = pi_prox / pi_behave of each token, (R, T) and detached, 1 at padding.

    This is the weight of decoupled PPO (arXiv 2110.00641; arXiv 2505.24298 for language models), which POPO applies to
    replayed groups (arXiv 2606.01281).
    """
    return log_ratio(rows.prox_logp.detach(), rows.behave_logp.detach(), rows.mask).exp()


def sequence_weight(prox_logp: Tensor, behave_logp: Tensor, mask: Tensor, ratio: SequenceRatio) -> Tensor:
    """Returns one weight for all tokens of a response: the product of their w, or their geometric mean.

    The product is the importance weight of the whole response. It is unbiased, but its variance grows with the length.
    The geometric mean has the size of a token's weight. The response's log-ratio, a sum or a mean, is clamped to +-20.

    Args:
        prox_logp: (R, T) log-probs under prox.
        behave_logp: (R, T) log-probs under behave.
        mask: (R, T), true at response tokens.
        ratio: "product" or "geometric_mean".

    Returns:
        (R, T) weights, detached, 1 at padding.
    """
    logs = log_ratio(prox_logp.detach(), behave_logp.detach(), mask).sum(dim=-1, keepdim=True)
    if ratio == "geometric_mean":
        logs = logs / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    weight = logs.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    return torch.where(mask.bool(), weight, 1.0)


class BehaveWeight(KeepsState, ABC):
    """Slot: corrects the loss of a token for the policy that sampled it.

    Attributes:
        correct_fresh: Whether rows sampled this iteration are weighted as well.
    """

    correct_fresh = False

    @abstractmethod
    def __call__(self, rows: ObjectiveInputs) -> tuple[Tensor, Tensor]:
        """Returns (weight, raw), both (R, T) and detached; `raw` is the unchanged pi_prox / pi_behave, for the log."""


class NoCorrection(BehaveWeight):
    """No correction: treats replayed rows as if prox had sampled them (POPO's ablation pi_old, arXiv 2606.01281)."""

    def __call__(self, rows: ObjectiveInputs) -> tuple[Tensor, Tensor]:
        """Returns (ones, pi_prox / pi_behave), both (R, T) and detached."""
        raw = decoupled_weight(rows)
        return torch.ones_like(raw), raw


class ReplayedWeight(BehaveWeight):
    """Base class of rules that weight replayed rows and give 1 to rows sampled this iteration.

    A fresh row's behave policy is prox by definition. A recomputed weight would measure the numerical difference
    between engine and trainer, which stays visible in `raw`.

    Args:
        correct_fresh: Weight fresh rows as well, which also corrects the engine's numerical error.
        cap: Upper bound of the weight; null for none.
    """

    cap: float | None = None

    def __init__(self, correct_fresh: bool = False, cap: float | None = None) -> None:
        setting = f"{type(self).__name__}.cap"
        if cap is not None and not cap >= 1:
            raise SettingError(
                f"{setting} is {cap}; it must be at least 1, the weight of an on-policy token, or null for no cap."
            )
        self.correct_fresh = correct_fresh
        self.cap = None if cap is None else held(setting, cap)

    @abstractmethod
    def rule(self, rows: ObjectiveInputs, raw: Tensor) -> Tensor:
        """Returns the weight (R, T) of every row before the cap, as if all were replayed.

        `raw` (R, T) is pi_prox / pi_behave.
        """

    def __call__(self, rows: ObjectiveInputs) -> tuple[Tensor, Tensor]:
        """Returns (weight, raw), both (R, T) and detached; `raw` is pi_prox / pi_behave, also on fresh rows."""
        raw = decoupled_weight(rows)
        weight = self.rule(rows, raw)
        if self.cap is not None:
            weight = weight.clamp(max=self.cap)
        if not self.correct_fresh:
            weight = torch.where(rows.fresh.bool().unsqueeze(-1), 1.0, weight)
        return weight, raw


class TruncatedIS(ReplayedWeight):
    """POPO's weight pi_prox / pi_behave per token, truncated at a cap.

    With correct_fresh and a cap of 2 it is truncated importance sampling against the engine's numerical error (TIS;
    verl's default cap).

    Deviation: a weight above the cap is lowered to the cap, where AReaL drops the token.

    Args:
        cap: Upper bound of a token's weight; null for none. The weight applies in both cases.
        correct_fresh: Weight fresh rows as well, which also corrects the engine's numerical error.
    """

    def __init__(self, cap: float | None = 5.0, correct_fresh: bool = False) -> None:
        super().__init__(correct_fresh, cap)

    def rule(self, rows: ObjectiveInputs, raw: Tensor) -> Tensor:
        """Returns w."""
        return raw


class MaskedIS(ReplayedWeight):
    """Keeps the weight within its bounds and drops tokens outside them.

    The weight is w if low <= w <= high, else 0. With correct_fresh this is IcePop's and MIS's rule against the engine's
    numerical error (arXiv 2510.18855; verl's rollout correction). With low 0 and high 5 it is AReaL's drop
    (2505.24298).

    Rejected tokens still count in the denominator, as in AReaL, so they make the step smaller. verl's rollout
    correction divides by the number of kept tokens: with a fraction s kept, its loss is 1 / s times this one's.

    Stored: nothing. Extra passes: none, as for TruncatedIS.

    Args:
        low: Minimum weight that is kept.
        high: Maximum weight that is kept.
        correct_fresh: Weight fresh rows as well, which also corrects the engine's numerical error.
    """

    def __init__(self, low: float = 0.5, high: float = 2.0, correct_fresh: bool = False) -> None:
        super().__init__(correct_fresh)
        self.low = within("MaskedIS.low", low, 0, 1, "0.5, since an on-policy token has weight 1")
        if not high >= 1:
            raise SettingError(f"MaskedIS.high is {high}; it must be at least 1, the weight of an on-policy token.")
        self.high = held("MaskedIS.high", high)

    def rule(self, rows: ObjectiveInputs, raw: Tensor) -> Tensor:
        """Returns w within the bounds, and 0 outside them."""
        return torch.where((raw >= self.low) & (raw <= self.high), raw, 0.0)


class SequenceIS(ReplayedWeight):
    """One weight for a whole response: POPO with a correction per response instead of per token.

    The product is the exact importance weight. The geometric mean is AReaL's choice at sequence level. Whether POPO
    weights tokens or responses is not known.

    Args:
        ratio: product or geometric_mean of the tokens' weights.
        cap: Upper bound of the weight; null for none.
        correct_fresh: Weight fresh rows as well, which also corrects the engine's numerical error.
    """

    def __init__(
        self, ratio: SequenceRatio = "geometric_mean", cap: float | None = 5.0, correct_fresh: bool = False
    ) -> None:
        super().__init__(correct_fresh, cap)
        self.ratio = one_of("SequenceIS.ratio", ratio, ("product", "geometric_mean"))

    def rule(self, rows: ObjectiveInputs, raw: Tensor) -> Tensor:
        """Returns `sequence_weight`."""
        return sequence_weight(rows.prox_logp, rows.behave_logp, rows.mask, self.ratio)


class SmoothedIS(ReplayedWeight):
    """w^alpha: between no correction (alpha 0) and the full one (alpha 1), with less variance than the full one.

    This is exponential smoothing of importance weights, as in off-policy bandits (arXiv 2305.15877). No paper on group
    replay has it; it is a choice of this package.

    Args:
        alpha: Exponent in [0, 1].
        cap: Upper bound of the smoothed weight; null for none.
        correct_fresh: Weight fresh rows as well, which also corrects the engine's numerical error.
    """

    def __init__(self, alpha: float = 0.5, cap: float | None = None, correct_fresh: bool = False) -> None:
        super().__init__(correct_fresh, cap)
        self.alpha = within("SmoothedIS.alpha", alpha, 0, 1, "0.5")

    def rule(self, rows: ObjectiveInputs, raw: Tensor) -> Tensor:
        """Returns w^alpha."""
        return raw**self.alpha
