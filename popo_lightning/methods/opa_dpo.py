"""OPA-DPO (arXiv 2501.09695): preference pairs whose stored winners are made likely again."""

from __future__ import annotations

import torch
from torch import Tensor

from popo_lightning.core.bounds import at_least
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.pair_loss import PairLoss, Reference, anchor_terms
from popo_lightning.objectives.weights import sequence_weight


def unlikeliness(rows: ObjectiveInputs) -> Tensor:
    """Measures how unlikely a stored response has become since it was sampled: 1 - min(1, w); 0 for a fresh one.

    w is the geometric mean of pi_prox / pi_behave over its tokens, so the length of a response does not count.

    Returns:
        (R, 1) numbers in [0, 1), detached.
    """
    tokens = sequence_weight(rows.prox_logp, rows.behave_logp, rows.mask, "geometric_mean")
    weight = torch.where(rows.mask.bool(), tokens, torch.inf).amin(dim=-1, keepdim=True)  # one number, 1 at padding
    return torch.where(rows.fresh[:, None], 0.0, 1 - weight.clamp(max=1))


class OPADPO(PairLoss):
    """OPA-DPO: direct preference optimization whose off-policy winners are imitated (arXiv 2501.09695).

    DPO keeps the policy near its reference, so it cannot learn a response that the reference hardly produces; a stored
    winner may even fall together with the loser. OPA-DPO first makes winners likely by supervised fine-tuning, and then
    compares. Here both happen in one loss of a pair,

        -log sigmoid(beta (D+ - D-)) + anchor * -log sigmoid(beta D+) + opa * u * -log pi_policy(y+),

    with u = 1 - min(1, geometric mean of pi_prox / pi_behave) for a stored winner and 0 for a fresh one, which the
    policy has just produced. With anchor 0 and opa 0 it is PairLoss. It needs the stored behave log-probs. Extra
    passes: those of PairLoss.

    Deviations: the source has two stages, expert responses, weights for an expert's severity, and pairs of images; here
    winners are the policy's own earlier responses. Its code averages over token positions inside the logistic function,
    which compares position t of one response with position t of the other; here log-probs are summed over a response
    first, as in DPO. Its anchor also pushes the second response down.

    Args:
        beta: Inverse temperature: how fast the push falls with the margin. The reward of a response is beta D.
        reference: prox, the policy at the start of the iteration, or first, the policy that the run began with.
        anchor: Coefficient of the term that keeps winners at least as likely as under the reference; 0 leaves it out.
        opa: Coefficient of the imitation of stored winners that have become unlikely; 0 leaves it out.
    """

    def __init__(self, beta: float = 0.1, reference: Reference = "prox", anchor: float = 1.0, opa: float = 0.1) -> None:
        super().__init__(beta, reference)
        self.anchor = at_least("OPADPO.anchor", anchor, 0, ", such as 1.0")
        self.opa = at_least("OPADPO.opa", opa, 0, ", such as 0.1")

    def terms(self, rows: ObjectiveInputs, own: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (R, 1) losses and pushes: those of PairLoss, plus anchor and imitation for winners."""
        value, push = super().terms(rows, own, sign)
        winners = (sign > 0).to(own.dtype)
        held, upward = anchor_terms(own, self.beta)
        imitated = self.opa * unlikeliness(rows)
        logp = torch.where(rows.mask.bool(), rows.logp.detach(), 0.0).sum(dim=-1, keepdim=True)
        value = value + winners * (self.anchor * held - imitated * logp)
        return value, push + winners * (self.anchor * upward + imitated)
