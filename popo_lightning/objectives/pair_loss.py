"""Losses of preference pairs: the log-probs of whole responses, compared two by two."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from popo_lightning.core.bounds import above, one_of
from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput

Reference = Literal["prox", "first"]


def pair_terms(own: Tensor, rival: Tensor, sign: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Returns a response's half of -log sigmoid(beta (D+ - D-)), and minus the loss's gradient with respect to D.

    D is the sum over a response's tokens of log(pi_policy / pi_reference) (arXiv 2305.18290 equation 7). The gradient
    with respect to D+ is -beta sigmoid(-beta (D+ - D-)); with respect to D- it has the other sign. It is a number, so
    the rows of a pair may be in different passes if each knows the D of the other.

    Args:
        own: (R, 1) D of each response.
        rival: (R, 1) D of the other response of its pair.
        sign: (R, 1), 1 for the chosen response, -1 for the rejected one, 0 for one that is neither.
        beta: Inverse temperature.

    Returns:
        ((R, 1) losses, which add up to the loss of a pair; (R, 1) minus the gradient with respect to D.)
    """
    margin = beta * sign * (own - rival)
    return 0.5 * sign.abs() * softplus(-margin), sign * beta * torch.sigmoid(-margin)


def anchor_terms(own: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Returns -log sigmoid(beta D), and minus its gradient with respect to D.

    This is the anchor of mDPO (arXiv 2406.11839), without its threshold. It makes the response likelier than under the
    reference.

    Args:
        own: (R, 1) D of each response.
        beta: Inverse temperature.
    """
    return softplus(-beta * own), beta * torch.sigmoid(-beta * own)


def spread_over_tokens(logp: Tensor, value: Tensor, push: Tensor, mask: Tensor) -> Tensor:
    """Returns token losses that add up to a response's value and have the gradient of -push * (sum of its log-probs).

    Args:
        logp: (R, T) log-probs, with gradient.
        value: (R, 1) value of each response, a constant.
        push: (R, 1) push of each response, a constant.
        mask: (R, T), true at response tokens.

    Returns:
        (R, T) losses, 0 at padding.
    """
    mask = mask.bool()
    share = value.detach() / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(mask, share - push.detach() * (logp - logp.detach()), 0.0)


class PairLoss(TrustRegion):
    """Direct preference optimization of a pair's two responses, each as a whole (arXiv 2305.18290).

    The loss of a pair is -log sigmoid(beta (D+ - D-)), with D the sum over tokens of log(pi_policy / pi_reference). The
    push on a pair falls as its margin grows; this replaces a clip. With prox as the reference it is online DPO: an
    iteration's first step is REINFORCE with +-beta / 2. No behavior weight applies, because which response is better
    does not depend on who sampled it. Use it with a composer that makes pairs and with PairMean.

    The loss of one row needs the D of the other, which the training step computes before the first micro-batch (`rival`
    of ObjectiveInputs). So a pair may be split over micro-batches, and the gradient is exact. Extra passes: one forward
    pass per minibatch, but none for the first of an iteration with prox; with the first policy as the reference, two
    of that policy. Stored: nothing.

    Args:
        beta: Inverse temperature: how fast the push falls with the margin. The reward of a response is beta D.
        reference: prox, the policy at the start of the iteration, or first, the policy that the run began with.
    """

    compares_pairs = True
    includes_is_weight = True

    def __init__(self, beta: float = 0.1, reference: Reference = "prox") -> None:
        name = type(self).__name__
        self.beta = above(f"{name}.beta", beta, 0, "0.1")
        one_of(f"{name}.reference", reference, ("prox", "first"))
        self.needs_reference = reference == "first"
        self.found: dict[str, float] = {}

    def log_ratios(self, rows: ObjectiveInputs) -> Tensor:
        """Returns D, (R, 1) detached: the sum over a response's tokens of log(pi_policy / pi_reference)."""
        center = rows.ref_logp if self.needs_reference else rows.prox_logp
        if center is None:
            raise ValueError("PairLoss needs the reference log-prob of every token, and the caller gave none.")
        return torch.where(rows.mask.bool(), rows.logp - center, 0.0).detach().sum(dim=-1, keepdim=True)

    def for_pairs(self, margins: Tensor) -> TrustRegion:
        """Returns the loss with the margins of a minibatch in its report.

        Args:
            margins: (P,) D+ - D- of the minibatch's pairs, over all ranks, before the step.
        """
        region = copy.copy(self)
        if len(margins):
            accuracy = (margins > 0).double().mean() + 0.5 * (margins == 0).double().mean()
            region.found = {"pair_margin": float(margins.double().mean()), "pair_accuracy": float(accuracy)}
        return region

    def report(self) -> dict[str, float]:
        """Returns mean margin and accuracy of the minibatch's pairs, if they have been computed."""
        return self.found

    def terms(self, rows: ObjectiveInputs, own: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (R, 1) losses and pushes of responses.

        Args:
            rows: Rows of the responses.
            own: (R, 1) D of each response.
            sign: (R, 1), 1 for chosen, -1 for rejected.
        """
        if rows.rival is None:
            raise ValueError("PairLoss needs the log-ratio of each row's rival, and the caller gave none.")
        return pair_terms(own, rows.rival, sign, self.beta)

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Returns the losses, the ratio to prox for the log, and no clipped token; `weight` is 1."""
        mask = rows.mask.bool()
        sign = rows.advantages[:, :1].sign()
        loss = spread_over_tokens(rows.logp, *self.terms(rows, self.log_ratios(rows), sign), mask)
        ratio = log_ratio(rows.logp.detach(), rows.prox_logp.detach(), mask).exp()
        return TrustRegionOutput(loss, ratio, torch.zeros_like(mask))
