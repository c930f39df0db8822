"""Trust regions around the policy that sampled: their ratio pi_policy / pi_behave has the behaviour weight in it."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.objectives.inputs import MinibatchTokens, ObjectiveInputs
from popo_lightning.objectives.trust_regions import FixedClip, PPOClip


def sampled_logp(rows: ObjectiveInputs) -> Tensor:
    """Log-probs (R, T) under the policy that sampled: behave's on replayed rows, prox's on fresh ones.

    Fresh rows were sampled by prox; the engine's own log-probs of them differ from prox's by rounding, which must not
    fill the trust region. As for behaviour weights.
    """
    return torch.where(rows.fresh.bool().unsqueeze(-1), rows.prox_logp, rows.behave_logp).detach()


class BehaveAligned(PPOClip):
    """PPO's clip of pi_policy / pi_behave around 1: POPO's ablation that aligns fully with behave (arXiv 2606.01281).

    The same as RePO's (arXiv 2506.09340) and TRL's replayed loss. On stale rows the ratio starts away from 1, often
    outside the bounds already, and then such tokens teach nothing or are not held back. `behave_weight` must be
    NoCorrection. Needs the stored behave log-probs, no passes. On fresh rows it is PPOClip. Inferred: the paper names
    the ablation and gives no formula.

    Args:
        clip_low: The ratio gives no more gain below 1 - clip_low.
        clip_high: The ratio gives no more gain above 1 + clip_high.
        dual_clip: Bound of the ratio where the advantage is negative, null for none.
    """

    includes_is_weight = True

    def center(self, rows: ObjectiveInputs) -> Tensor:
        """Give `sampled_logp` of the rows."""
        return sampled_logp(rows)


class FixedBehaveClip(FixedClip):
    """A clip around behave with bounds that were found for one minibatch."""

    includes_is_weight = True

    def center(self, rows: ObjectiveInputs) -> Tensor:
        """Give `sampled_logp`."""
        return sampled_logp(rows)


def sampled_tokens(tokens: MinibatchTokens) -> Tensor:
    """As `sampled_logp`, (N,)."""
    return torch.where(tokens.fresh.bool(), tokens.prox_logp, tokens.behave_logp)
