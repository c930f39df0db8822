"""Aggregations: reduce the token losses to the loss of a minibatch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from popo_lightning.core.bounds import above
from popo_lightning.core.kept_state import KeepsState


class Aggregation(KeepsState, ABC):
    """Slot: the weight of a row's tokens, and the divisor of their sum.

    The loss of a minibatch is sum over rows of row_weight * (sum over the row's tokens) / denominator, where the
    denominator is the sum of `size` over all its rows and ranks. The losses of micro-batches therefore add up, however
    the minibatch is split. Tokens that a rule rejects still count, as in AReaL: they make the step smaller, and the
    other tokens do not compensate. (verl takes them out of the mask and divides by the number of tokens kept.)
    """

    @abstractmethod
    def row_weights(self, lengths: Tensor) -> Tensor:
        """Maps the response lengths (R,) of some rows to the factors of their token losses, (R,) float32."""

    @abstractmethod
    def size(self, lengths: Tensor) -> float:
        """Returns these rows' share of the denominator."""


class TokenMean(Aggregation):
    """Mean over all tokens of the minibatch: a long response weighs more than a short one (DAPO, 2503.14476)."""

    def row_weights(self, lengths: Tensor) -> Tensor:
        """Returns ones."""
        return torch.ones_like(lengths, dtype=torch.float32)

    def size(self, lengths: Tensor) -> float:
        """Returns the number of tokens."""
        return float(lengths.sum())


class SequenceMean(Aggregation):
    """Mean over responses of the mean over their tokens (GRPO, 2402.03300 equation 3; GSPO, 2507.18071)."""

    def row_weights(self, lengths: Tensor) -> Tensor:
        """Returns 1 / length; a row without tokens has no loss to weigh."""
        return 1 / lengths.clamp(min=1).float()

    def size(self, lengths: Tensor) -> float:
        """Returns the number of responses."""
        return float(len(lengths))


class PairMean(TokenMean):
    """Mean over preference pairs of the sum over the tokens of both responses (DPO, 2305.18290 equation 7)."""

    def size(self, lengths: Tensor) -> float:
        """Returns the number of pairs."""
        return len(lengths) / 2


class SequenceSum(SequenceMean):
    """Mean over responses of the sum over their tokens, divided by a constant (Dr.GRPO, 2503.20783).

    A token weighs the same in a short and in a long response, in every minibatch.

    Args:
        length: The constant. Dr.GRPO uses the response limit, which is data.max_new_tokens.
    """

    def __init__(self, length: float) -> None:
        self.length = above("SequenceSum.length", length, 0, "data.max_new_tokens")

    def row_weights(self, lengths: Tensor) -> Tensor:
        """Returns 1 / constant."""
        return torch.full_like(lengths, 1 / self.length, dtype=torch.float32)
