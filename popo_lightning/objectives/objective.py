"""The objective: behaviour weight times trust region, plus regularizers, summed over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lightning.objectives.regularizers import Regularizer
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion
from popo_lightning.objectives.weights import BehaveWeight, Decoupled


@dataclass
class ObjectiveInputs:
    """R responses of T right-padded tokens. Log-probs are float32, taken at the sampling temperature.

    Args:
        logp: (R, T), policy, with gradient.
        prox_logp: (R, T), centre of the trust region.
        behave_logp: (R, T), the policy that sampled the tokens, stored at generation.
        advantages: (R, 1) or (R, T).
        mask: (R, T), true at response tokens; anything may stand elsewhere.
        fresh: (R,), true where the row was sampled this iteration.
        entropy: (R, T), with gradient if a regularizer uses it.
        ref_logp: (R, T), frozen reference.
    """

    logp: Tensor
    prox_logp: Tensor
    behave_logp: Tensor
    advantages: Tensor
    mask: Tensor
    fresh: Tensor
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None


@dataclass
class TokenStatistics:
    """Detached (R, T) tensors for the log; select with the mask, padding holds fillers.

    `ratio` = pi_policy / pi_prox, `clipped` = no gradient, `weight_raw` = pi_prox / pi_behave, `weight` = as applied.
    """

    ratio: Tensor
    clipped: Tensor
    weight_raw: Tensor
    weight: Tensor
    entropy: Tensor | None


class Objective:
    """POPO's objective, and with other parts in its slots its relatives'.

    It maximises, over the tokens of a minibatch of groups (arXiv 2606.01281),

        J = mean over tokens of  w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),
        w = pi_prox / pi_behave (detached),  r = pi_policy / pi_prox,

    with w = 1 on fresh rows, where this is DAPO's surrogate. Inferred: of the paper only the abstract, the start of
    the introduction and an article by the authors could be read. They say that behave and prox are decoupled, that
    importance sampling corrects the replayed groups, and that one trust region serves all data; this formula is the
    decoupled PPO objective (arXiv 2110.00641) that fits those words. Token-wise w, its cap and the token mean are
    choices made here.

    Args:
        behave_weight: Correction for the policy that sampled the tokens.
        trust_region: Bound on the step away from prox.
        regularizers: Further terms of the loss, none by default.
    """

    def __init__(
        self,
        # The default objects hold settings only and are never changed, so sharing them is safe.
        behave_weight: BehaveWeight = Decoupled(),  # noqa: B008
        trust_region: TrustRegion = PPOClip(),  # noqa: B008
        regularizers: list[Regularizer] | None = None,
    ) -> None:
        self.behave_weight = behave_weight
        self.trust_region = trust_region
        self.regularizers: Sequence[Regularizer] = tuple(regularizers or ())

    @property
    def needs_reference(self) -> bool:
        """Whether a regularizer needs `ref_logp`."""
        return any(term.needs_reference for term in self.regularizers)

    @property
    def needs_entropy(self) -> bool:
        """Whether a regularizer needs `entropy` with gradient."""
        return any(term.needs_entropy for term in self.regularizers)

    def __call__(self, rows: ObjectiveInputs, denominator: float | Tensor) -> tuple[Tensor, TokenStatistics]:
        """Loss of some rows of a minibatch.

        Args:
            rows: One micro-batch.
            denominator: Number of response tokens of the whole minibatch, over its micro-batches and ranks, counted
                before any token is rejected. With this one number the losses and gradients of the parts add up to
                those of the whole; means of micro-batches would not.

        Returns:
            The scalar loss, sum over tokens / denominator, and the detached values per token.
        """
        mask = rows.mask.bool()
        weight, weight_raw = self.behave_weight(rows.prox_logp, rows.behave_logp, rows.fresh, mask)
        region = self.trust_region(rows.logp, rows.prox_logp, rows.advantages, mask)
        token_loss = weight * region.loss
        for term in self.regularizers:
            token_loss = token_loss + term(rows.logp, rows.ref_logp, rows.entropy, mask, weight)
        loss = torch.where(mask, token_loss, 0.0).sum() / denominator
        entropy = None if rows.entropy is None else rows.entropy.detach()
        return loss, TokenStatistics(region.ratio.detach(), region.clipped, weight_raw, weight, entropy)
