"""PNPO (arXiv 2608.01418): weights by the geometric mean of the ratios up to a token, for several epochs."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.core.bounds import held, within
from popo_lightning.core.errors import SettingError
from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio, sampled_logp
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, score_loss
from popo_lightning.objectives.weights import ReplayedWeight


def prefix_ratio(logp: Tensor, center_logp: Tensor, mask: Tensor) -> Tensor:
    """Returns the geometric mean of a response's ratios up to each token: exp((1/t) sum over k <= t of log r_k).

    t counts from 1. Without the root, the product of these ratios is the importance weight of the token and its prefix.
    The first token has its own ratio; the last has that of the whole response, as in GSPO.

    Args:
        logp: (R, T) log-probs of the numerator.
        center_logp: (R, T) log-probs of the denominator.
        mask: (R, T), true from a row's first token to its last.

    Returns:
        (R, T) ratios, with gradient to both log-probs; 1 at padding.
    """
    logs = log_ratio(logp, center_logp, mask)
    places = torch.arange(1, logs.shape[-1] + 1, device=logs.device)
    return torch.where(mask.bool(), logs.cumsum(dim=-1) / places, 0.0).exp()


class PNPO(TrustRegion):
    """Prefix-normalized policy optimization: one number weights a token and decides whether it counts (2608.01418).

    Loss -w A log pi for tokens with min_ratio <= w <= max_ratio and 0 for others, with w = `prefix_ratio` of pi_policy
    to pi_behave, detached. `clipped` is true for the others. `behave_weight` must be NoCorrection, because the ratio is
    already relative to behave. The paper finds it better than GSPO with four epochs over the same responses, but not
    with one. Stored: the behave log-probs. Extra passes: none.

    Inferred: only the abstract and summaries of the paper could be read. They have the formula of w, its two uses and
    hard rejection. They give neither bound, nor whether w has a gradient; here it has none, as in an importance weight.

    Deviation: on fresh rows behave is prox, which differs by the engine's rounding.

    Args:
        min_ratio: Tokens with a smaller w teach nothing.
        max_ratio: Tokens with a greater w teach nothing.
    """

    includes_is_weight = True

    def __init__(self, min_ratio: float = 0.5, max_ratio: float = 2.0) -> None:
        self.min_ratio = within("PNPO.min_ratio", min_ratio, 0, 1, "0.5, since an on-policy token has w = 1")
        if not max_ratio >= 1:
            raise SettingError(f"PNPO.max_ratio is {max_ratio}; it must be at least 1, the w of an on-policy token.")
        self.max_ratio = held("PNPO.max_ratio", max_ratio)

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Returns -w A log pi, w, and which tokens are rejected."""
        mask = rows.mask.bool()
        ratio = prefix_ratio(rows.logp.detach(), sampled_logp(rows), mask)
        kept = (ratio >= self.min_ratio) & (ratio <= self.max_ratio)
        advantages = torch.where(mask, rows.advantages, 0.0)
        return TrustRegionOutput(score_loss(rows.logp, ratio * advantages * kept, mask), ratio, ~kept)


class PrefixIS(ReplayedWeight):
    """PNPO's number as POPO's weight: prefix_ratio of pi_prox to pi_behave on replayed rows, truncated at a cap.

    It lies between one weight per token (TruncatedIS) and one per response (SequenceIS with geometric_mean). The first
    tokens of a response weigh like the former, the last like the latter. No paper has it in POPO's objective; it is a
    choice of this package. Stored: nothing. Extra passes: none.

    Args:
        cap: Upper bound of a token's weight; null for none.
        correct_fresh: Weight fresh rows as well, which also corrects the engine's numerical error.
    """

    def __init__(self, cap: float | None = 5.0, correct_fresh: bool = False) -> None:
        super().__init__(correct_fresh, cap)

    def rule(self, rows: ObjectiveInputs, raw: Tensor) -> Tensor:
        """Returns `prefix_ratio`."""
        return prefix_ratio(rows.prox_logp.detach(), rows.behave_logp.detach(), rows.mask)
