"""AsymRE: a baseline shifted away from the group's mean."""

from __future__ import annotations

from torch import Tensor

from popo_lightning.core.bounds import finite
from popo_lightning.objectives.advantages import Advantage


class ShiftedBaseline(Advantage):
    """AsymRE's advantage: R - (mean + shift), a baseline below the mean (arXiv 2506.20520; 2509.24203, REP family).

    On-policy, a baseline changes only the variance. Off-policy, it changes the fixed point: failures of another policy
    teach little, and a lower baseline gives successes more weight. The source uses no importance weight and no clip,
    which makes the loss A * log pi: use behave weight `NoCorrection` and a trust region without a bound. Stored:
    nothing. Extra passes: none.

    An ineffective group gets -shift on every response. This is intended: with a negative shift it pulls the policy
    towards its samples, as a forward KL would. A positive shift pushes away from all samples, which collapses
    off-policy according to the source.

    Args:
        shift: Added to the mean; negative values put the baseline below the mean.
    """

    def __init__(self, shift: float = -0.1) -> None:
        self.shift = finite("ShiftedBaseline.shift", shift, "-0.1")

    def __call__(self, rewards: Tensor) -> Tensor:
        """Maps rewards (G, K) to advantages (G, K)."""
        return rewards - (rewards.mean(dim=-1, keepdim=True) + self.shift)
