"""The objective: behavior weight times trust region, plus regularizers, summed over tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.objectives.aggregations import Aggregation, PairMean, TokenMean
from popo_lightning.objectives.inputs import MinibatchTokens, ObjectiveInputs
from popo_lightning.objectives.regularizers import Regularizer
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion
from popo_lightning.objectives.weights import BehaveWeight, NoCorrection, TruncatedIS


@dataclass
class TokenStatistics:
    """Detached (R, T) tensors for the log. Select with the mask, because padding holds arbitrary values.

    `ratio` is the ratio that the trust region bounds, usually pi_policy / pi_prox. `clipped` is true where a bound is
    active. `weight_raw` = pi_prox / pi_behave; `weight` is the applied weight.
    """

    ratio: Tensor
    clipped: Tensor
    weight_raw: Tensor
    weight: Tensor
    entropy: Tensor | None


class Objective:
    """POPO's objective. With other rules in its slots it is the objective of related methods.

    It maximizes, over the tokens of a minibatch of groups (arXiv 2606.01281),

        J = mean over tokens of  w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),
        w = pi_prox / pi_behave (detached),  r = pi_policy / pi_prox,

    with w = 1 on fresh rows, where this is DAPO's surrogate. Inferred: only the paper's abstract, the start of its
    introduction and an article by the authors could be read. They say that behave and prox are decoupled, that
    importance sampling corrects the replayed groups, and that one trust region serves all data. This formula is the
    decoupled PPO objective (arXiv 2110.00641) that fits those words. Token-wise w, its cap and the token mean are
    choices made here.

    Args:
        behave_weight: Corrects for the policy that sampled the tokens.
        trust_region: Bounds how far a step moves the policy from prox.
        regularizers: Additional loss terms; none by default.
        aggregation: Reduces the token losses to one loss.
    """

    def __init__(
        self,
        # The default objects hold settings only and are never changed, so sharing them is safe.
        behave_weight: BehaveWeight = TruncatedIS(),  # noqa: B008
        trust_region: TrustRegion = PPOClip(),  # noqa: B008
        regularizers: list[Regularizer] | None = None,
        aggregation: Aggregation = TokenMean(),  # noqa: B008
    ) -> None:
        name = type(trust_region).__name__
        if trust_region.includes_is_weight and not isinstance(behave_weight, NoCorrection):
            why = f"the ratio of {name} reaches back to the behavior policy already"
            if trust_region.compares_pairs:
                why = f"{name} compares responses whoever sampled them"
            raise SettingError(
                f"model.behave_weight is {type(behave_weight).__name__}, but {why}; use NoCorrection with it."
            )
        if trust_region.compares_pairs and not isinstance(aggregation, PairMean):
            raise SettingError(
                f"model.aggregation is {type(aggregation).__name__}, but {name} sums over whole responses and counts "
                "pairs; use PairMean with it."
            )
        self.behave_weight = behave_weight
        self.trust_region = trust_region
        self.regularizers: Sequence[Regularizer] = tuple(regularizers or ())
        self.aggregation = aggregation

    @property
    def needs_reference(self) -> bool:
        """Returns whether the trust region or a regularizer needs `ref_logp`."""
        return self.trust_region.needs_reference or any(term.needs_reference for term in self.regularizers)

    @property
    def needs_entropy(self) -> bool:
        """Returns whether a regularizer needs `entropy` with gradient."""
        return any(term.needs_entropy for term in self.regularizers)

    @property
    def needs_minibatch_tokens(self) -> bool:
        """Returns whether `for_minibatch` must be called before the first micro-batch of a minibatch."""
        return self.trust_region.needs_minibatch_tokens

    def for_minibatch(self, tokens: MinibatchTokens) -> Objective:
        """Returns the objective for all micro-batches of the minibatch with these tokens."""
        return self._around(self.trust_region.for_minibatch(tokens))

    def for_pairs(self, margins: Tensor) -> Objective:
        """Returns the objective for a minibatch with these margins (P,) of pairs."""
        return self._around(self.trust_region.for_pairs(margins))

    def _around(self, trust_region: TrustRegion) -> Objective:
        found = copy.copy(self)
        found.trust_region = trust_region
        return found

    def report(self) -> dict[str, float]:
        """Returns the trust region's numbers for the log."""
        return self.trust_region.report()

    def __call__(self, rows: ObjectiveInputs, denominator: float | Tensor) -> tuple[Tensor, TokenStatistics]:
        """Computes the loss of some rows of a minibatch.

        Args:
            rows: One micro-batch.
            denominator: Sum of `aggregation.size` over all rows of the whole minibatch, its micro-batches and ranks,
                counted before any token is rejected. With this one number the losses and gradients of micro-batches
                add up to those of the whole minibatch; means of micro-batches would not.

        Returns:
            The scalar loss, sum over rows / denominator, and the detached values per token.
        """
        mask = rows.mask.bool()
        weight, weight_raw = self.behave_weight(rows)
        check_shape("model.behave_weight", self.behave_weight, "weight", weight, mask)
        region = self.trust_region(rows, weight)
        check_shape("model.trust_region", self.trust_region, "loss", region.loss, mask)
        token_loss = weight * region.loss
        if rows.loss_weight is not None:
            token_loss = rows.loss_weight.unsqueeze(-1) * token_loss
        for term in self.regularizers:
            check_shape("model.regularizers", term, "loss", added := term(rows, weight), mask)
            token_loss = token_loss + added
        row_loss = torch.where(mask, token_loss, 0.0).sum(dim=-1)
        loss = (self.aggregation.row_weights(mask.sum(dim=-1)) * row_loss).sum() / denominator
        entropy = None if rows.entropy is None else rows.entropy.detach()
        return loss, TokenStatistics(region.ratio.detach(), region.clipped, weight_raw, weight, entropy)


def check_shape(setting: str, rule: object, name: str, found: Tensor, mask: Tensor) -> None:
    """Raises SettingError unless a rule returned one number per token, or per row.

    Args:
        setting: The rule's slot.
        rule: The rule.
        name: What it returned.
        found: That; a tensor of shape (R, T) or (R, 1) is right.
        mask: (R, T) mask of the rows.
    """
    shape, (rows, tokens) = tuple(getattr(found, "shape", ())), mask.shape
    if shape not in ((rows, tokens), (rows, 1)):
        raise SettingError(
            f"{setting} is {type(rule).__name__}, which returned a {name} of shape {shape}; return one number per "
            f"token, ({rows}, {tokens}) here"
        )
