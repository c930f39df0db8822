"""Regularizers: per-token loss terms beside the policy gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from popo_lightning.core.bounds import at_least, one_of
from popo_lightning.core.kept_state import KeepsState
from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio

Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS = ("k1", "k2", "k3")
K3_BOUND = 10.0


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: Estimator, mask: Tensor) -> Tensor:
    """Estimates KL(policy || ref) per token from tokens the policy sampled.

    With log d = ref_logp - logp: k1 = -log d, k2 = (log d)^2 / 2, k3 = d - 1 - log d (Schulman's "Approximating KL
    Divergence"; k3 is GRPO's, arXiv 2402.03300 equation 4). As values k1 and k3 are unbiased and k2 nearly so. For
    their gradients see `kl_loss`.

    Deviation: log d is clamped to +-20 and k3 to at most 10, both as in verl; a clamped token gives no gradient.

    Args:
        logp: (R, T) log-probs under the policy, with gradient.
        ref_logp: (R, T) log-probs under the reference, treated as a constant.
        estimator: "k1", "k2" or "k3".
        mask: (R, T), true at response tokens.

    Returns:
        (R, T) estimates, 0 at padding.
    """
    log_d = log_ratio(ref_logp.detach(), logp, mask)
    if estimator == "k1":
        return -log_d
    if estimator == "k2":
        return 0.5 * log_d.square()
    # expm1 keeps the small differences that exp(x) - 1 rounds away.
    return (log_d.expm1() - log_d).clamp(max=K3_BOUND)


def kl_loss(logp: Tensor, ref_logp: Tensor, estimator: Estimator, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns the KL estimate as a loss.

    On tokens the policy sampled, k2's gradient is the unbiased gradient of KL(policy || ref). k3's gradient is that of
    the forward KL; it is kept because published recipes use it. k1's gradient has mean zero and exerts no pressure, so
    k1 here keeps its value and takes k2's gradient (straight-through).

    `weight` (R, T) corrects tokens that another policy sampled, as arXiv 2512.02556 (DeepSeek-V3.2) does. Deviation:
    they multiply by pi_policy / pi_behave; the behavior weight pi_prox / pi_behave leaves out the part inside the
    trust region, so that fresh rows have the usual uncorrected KL term.

    Args:
        logp: (R, T) log-probs under the policy, with gradient.
        ref_logp: (R, T) log-probs under the reference.
        estimator: "k1", "k2" or "k3".
        mask: (R, T), true at response tokens.
        weight: (R, T) weights, detached, or None for 1.

    Returns:
        (R, T) losses, 0 at padding.
    """
    loss = kl_estimate(logp, ref_logp, estimator, mask)
    if estimator == "k1":
        k2 = kl_estimate(logp, ref_logp, "k2", mask)
        loss = k2 + (loss - k2).detach()
    return loss if weight is None else weight * loss


def entropy_bonus(entropy: Tensor, mask: Tensor) -> Tensor:
    """Returns minus the entropy (R, T) of the next-token distribution, 0 at padding. Minimising it raises the entropy.

    Replayed tokens are not weighted, because the entropy is the present policy's and only the prefixes are old.
    """
    return -torch.where(mask.bool(), entropy, 0.0)


class Regularizer(KeepsState, ABC):
    """Slot: a term added to the loss of every response token.

    Attributes:
        needs_reference: Whether `ref_logp` must be given, which costs a forward pass of the reference policy.
        needs_entropy: Whether `entropy` must be given with gradient.
    """

    needs_reference: bool = False
    needs_entropy: bool = False

    @abstractmethod
    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
        """Returns the loss per token (R, T); `weight` (R, T) is the behavior weight."""


class EntropyBonus(Regularizer):
    """Rewards entropy: adds -coefficient * entropy to the loss of a token.

    Args:
        coefficient: Coefficient of the bonus, 0.001 in the recipes POPO starts from.
    """

    needs_entropy = True

    def __init__(self, coefficient: float) -> None:
        self.coefficient = at_least("EntropyBonus.coefficient", coefficient, 0)

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
        """Returns coefficient * `entropy_bonus`; `weight` is not used."""
        if rows.entropy is None:
            raise ValueError("EntropyBonus needs the entropy of every token, and the caller gave none.")
        return self.coefficient * entropy_bonus(rows.entropy, rows.mask)


class KL(Regularizer):
    """Keeps the policy near the reference: adds coefficient * weight * KL estimate to the loss of a token.

    Args:
        coefficient: Coefficient of the penalty.
        estimator: k3 as in GRPO, k2 for the unbiased gradient of the reverse KL, k1 for k1's value with k2's gradient.
    """

    needs_reference = True

    def __init__(self, coefficient: float, estimator: Estimator = "k3") -> None:
        self.coefficient = at_least("KL.coefficient", coefficient, 0)
        self.estimator = one_of("KL.estimator", estimator, ESTIMATORS)

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
        """Returns coefficient * `kl_loss`."""
        if rows.ref_logp is None:
            raise ValueError("KL needs the reference log-prob of every token, and the caller gave none.")
        return self.coefficient * kl_loss(rows.logp, rows.ref_logp, self.estimator, rows.mask, weight)


class SquaredLogRatio(Regularizer):
    """Keeps the policy near prox: adds coefficient * (log pi_policy - log pi_prox)^2 to the loss of a token.

    This is OPMD's regularizer (arXiv 2509.24203, Trinity-RFT's rec policy loss, whose coefficient also contains the 1/2
    of k2). Its derivation squares a residual of the given tokens, regardless of the policy that sampled them, so no
    behavior weight applies. Stored: nothing. Extra passes: none. Before an iteration's first step prox is the policy,
    so the term is 0.

    Deviations: the distance is to prox; in the paper it is to the policy that sampled. The two are equal on fresh rows.
    The log-ratio is clamped to +-20.

    Args:
        coefficient: Coefficient of the penalty.
    """

    def __init__(self, coefficient: float = 0.1) -> None:
        self.coefficient = at_least("SquaredLogRatio.coefficient", coefficient, 0)

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
        """Returns the penalty; `weight` is not used."""
        return self.coefficient * log_ratio(rows.logp, rows.prox_logp.detach(), rows.mask).square()
