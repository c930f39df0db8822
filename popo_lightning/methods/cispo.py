"""CISPO (arXiv 2506.13585): clipped importance weights that leave every token a gradient."""

from __future__ import annotations

from torch import Tensor

from popo_lightning.core.bounds import above
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput, capped_score_loss


class CISPO(TrustRegion):
    """Clips importance-sampling weights, so every token keeps a bounded gradient (arXiv 2506.13585, MiniMax-M1).

    Loss -sg[clamp(r, 1 - clip_low, 1 + clip_high)] A log pi with r = pi_policy / pi_prox. Where the clamp is inactive
    the gradient is PPO's. `clipped` counts the tokens whose ratio is clamped. Stored: nothing. Extra passes: none.

    The paper bounds the ratio from above only and does not give the bound. The default is ScaleRL's cap of about 5
    (arXiv 2510.13786). verl's examples use 0.2.

    Args:
        clip_low: The ratio is clamped to at least 1 - clip_low; null for no lower bound.
        clip_high: The ratio is clamped to at most 1 + clip_high; null for no upper bound.
    """

    def __init__(self, clip_low: float | None = None, clip_high: float = 4.0) -> None:
        self.clip_low = clip_low if clip_low is None else above("CISPO.clip_low", clip_low, 0, "0.2, or null for none")
        self.clip_high = above("CISPO.clip_high", clip_high, 0, "4.0")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Applies `capped_score_loss` around prox."""
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        bounds = low, 1 + self.clip_high
        return capped_score_loss(rows.logp, rows.prox_logp, rows.advantages, rows.mask, *bounds)
