"""torchmetrics classes for evaluation, and the effective sample size of importance weights."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from popo_lightning.core.errors import SettingError


class _MeanOverProblems(MeanMetric):
    """Averages one number per problem over all problems of all ranks, in float64.

    Args:
        k: Number of samples of each problem that it needs.
    """

    higher_is_better = True  # type: ignore[assignment]

    def __init__(self, k: int) -> None:
        super().__init__(nan_strategy="disable")
        self.set_dtype(torch.float64)
        if k < 1:
            raise SettingError(f"k is {k}; avg@k and pass@k need at least 1 sample")
        self.k = k

    def update(self, correct: Tensor) -> None:  # type: ignore[override]
        """Adds problems to the mean.

        Args:
            correct: (problems, n) accuracies, with n >= k.
        """
        if correct.dim() != 2 or correct.shape[1] < self.k:
            raise ValueError(f"expected (problems, at least {self.k}) accuracies, got shape {tuple(correct.shape)}")
        super().update(self.of_problems(correct))

    @abstractmethod
    def of_problems(self, correct: Tensor) -> Tensor:
        """Maps (problems, n) accuracies to one float64 number per problem, (problems,)."""


class AvgAtK(_MeanOverProblems):
    """avg@k: accuracy of k samples per problem, averaged over samples and then over problems.

    Args:
        k: Number of samples of each problem that count. These are the first k.
    """

    def of_problems(self, correct: Tensor) -> Tensor:
        """Returns the mean of the first k samples."""
        return correct[:, : self.k].double().mean(1)


class PassAtK(_MeanOverProblems):
    """Unbiased pass@k: the probability that at least one of k samples, drawn from n, is correct.

    1 - C(n - c, k) / C(n, k) with c correct ones (2107.03374, equation 1), in its product form. An accuracy above one
    half counts as correct.

    Args:
        k: Number of samples drawn.
    """

    def of_problems(self, correct: Tensor) -> Tensor:
        """Returns the probability for each problem."""
        n = correct.shape[1]
        wrong = (correct <= 0.5).sum(1)
        i = torch.arange(self.k, device=correct.device)
        # The product is the probability that k draws without replacement are all wrong; it is 0 if wrong < k.
        return 1 - ((wrong[:, None] - i).clamp(min=0).double() / (n - i)).prod(1)


def effective_sample_size(weights: Tensor) -> float:
    """Returns the effective sample size as a fraction of N: (sum w)^2 / (N sum w^2), in (0, 1]."""
    weights = weights.double()
    return float(weights.sum() ** 2 / (len(weights) * weights.square().sum()))
