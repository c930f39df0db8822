"""torchmetrics classes for evaluation, and the effective sample size of importance weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from popo_lightning.core.errors import SettingError


class AvgAtK(Metric):
    """avg@k: accuracy of k samples per problem, averaged over samples and then over problems.

    Args:
        k: Number of samples of each problem that count, the first ones.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    problems: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _checked(k)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Adds problems.

        Args:
            correct: (problems, n) accuracies with n >= k.
        """
        _check_samples(correct, self.k)
        self.total += correct[:, : self.k].double().mean(1).sum()
        self.problems += len(correct)

    def compute(self) -> Tensor:
        """The mean over problems."""
        return (self.total / self.problems).float()


class PassAtK(Metric):
    """Unbiased pass@k: the probability that at least one of k samples, drawn from n, is correct.

    1 - C(n - c, k) / C(n, k) with c correct ones (2107.03374, equation 1), in its product form.

    Args:
        k: Number of samples drawn.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    problems: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _checked(k)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Adds problems.

        Args:
            correct: (problems, n) accuracies with n >= k; above one half counts as right.
        """
        _check_samples(correct, self.k)
        n = correct.shape[1]
        wrong = (correct <= 0.5).sum(1)
        i = torch.arange(self.k, device=correct.device)
        # the chance that k draws without replacement are all wrong; a factor is 0 once the wrong ones run out
        all_wrong = ((wrong[:, None] - i).clamp(min=0).double() / (n - i)).prod(1)
        self.total += (1 - all_wrong).sum()
        self.problems += len(correct)

    def compute(self) -> Tensor:
        """The mean over problems."""
        return (self.total / self.problems).float()


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / (N sum w^2), in (0, 1]: the effective sample size as a fraction of N."""
    weights = weights.double()
    return float(weights.sum() ** 2 / (len(weights) * weights.square().sum()))


def _checked(k: int) -> int:
    if k < 1:
        raise SettingError(f"k is {k}; avg@k and pass@k need at least 1 sample")
    return k


def _check_samples(correct: Tensor, k: int) -> None:
    if correct.dim() != 2 or correct.shape[1] < k:
        raise ValueError(f"expected (problems, at least {k}) accuracies, got shape {tuple(correct.shape)}")
