"""CISPO (arXiv 2506.13585): clipped importance weights that leave every token a gradient."""

from __future__ import annotations

from torch import Tensor

from popo_lightning.core.bounds import above
from popo_lightning.objectives.detached_loss import capped_score_loss
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.trust_regions import TrustRegion, TrustRegionOutput


class CISPO(TrustRegion):
    """Clipped importance-sampling weights: every token keeps a gradient, a limited one (arXiv 2506.13585, MiniMax-M1).

    Loss -sg[clamp(r, 1 - clip_low, 1 + clip_high)] A log pi with r = pi_policy / pi_prox. Where the clamp does nothing
    the gradient is PPO's. `clipped` counts the tokens whose ratio is cut. Nothing stored, no passes.

    The paper bounds from above only and does not give the bound; the default is ScaleRL's cap of about 5 (arXiv
    2510.13786). verl's examples take 0.2.

    Args:
        clip_low: The ratio is cut below 1 - clip_low, null for not at all.
        clip_high: The ratio is cut above 1 + clip_high.
    """

    def __init__(self, clip_low: float | None = None, clip_high: float = 4.0) -> None:
        self.clip_low = clip_low if clip_low is None else above("CISPO.clip_low", clip_low, 0, "0.2, or null for none")
        self.clip_high = above("CISPO.clip_high", clip_high, 0, "4.0")

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        """Apply `capped_score_loss` around prox."""
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        bounds = low, 1 + self.clip_high
        return capped_score_loss(rows.logp, rows.prox_logp, rows.advantages, rows.mask, *bounds)
