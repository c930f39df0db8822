"""PPO's clip around the sampling policy. Its ratio pi_policy / pi_behave already contains the behavior weight."""

from __future__ import annotations

from torch import Tensor

from popo_lightning.objectives.inputs import ObjectiveInputs, sampled_logp
from popo_lightning.objectives.trust_regions import PPOClip


class BehaveAligned(PPOClip):
    """PPO's clip of pi_policy / pi_behave around 1: POPO's ablation that aligns fully with behave (arXiv 2606.01281).

    It equals the loss of replayed rows in RePO (arXiv 2506.09340) and TRL. On stale rows the ratio starts away from 1,
    often already outside the bounds; such tokens teach nothing or are not bounded. `behave_weight` must be
    NoCorrection. It needs the stored behave log-probs. Extra passes: none. On fresh rows it is PPOClip. Inferred: the
    paper names the ablation and gives no formula.

    Args:
        clip_low: Ratios below 1 - clip_low give no further gain.
        clip_high: Ratios above 1 + clip_high give no further gain.
        dual_clip: Upper bound of the ratio for negative advantages; null for none.
    """

    includes_is_weight = True

    def center(self, rows: ObjectiveInputs) -> Tensor:
        """Returns `sampled_logp`."""
        return sampled_logp(rows)
