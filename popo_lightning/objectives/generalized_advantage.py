"""Generalized advantage estimation: advantages per token, from a critic's values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popo_lightning.core.bounds import within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.objectives.advantages import Advantage

VARIANCE_FLOOR = 1e-8


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Computes generalised advantage estimates and a critic's target returns (arXiv 1506.02438, as in PPO, 1707.06347).

        delta_t = r_t + gamma V_(t+1) - V_t,   A_t = sum over l of (gamma lam)^l delta_(t+l),   return_t = A_t + V_t

    with V = 0 after the last token, also if the token limit ended the response (as in verl).

    Args:
        rewards: (R, T) reward of each token.
        values: (R, T) values of the states before each token; padding may hold any value.
        mask: (R, T), true at response tokens, which come first in a row.
        gamma: Discount factor per token.
        lam: Weight of later deltas; 0 trusts the critic, 1 the rewards.

    Returns:
        (advantages, returns), both (R, T) float32, 0 at padding.
    """
    mask = mask.bool()
    rewards = torch.where(mask, rewards, 0.0).double()
    values = torch.where(mask, values, 0.0).double()
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values  # 0 at padding
    advantages = torch.where(mask, _discounted_sums(deltas, gamma * lam), 0.0)
    return advantages.float(), torch.where(mask, advantages + values, 0.0).float()


def _discounted_sums(terms: Tensor, discount: float) -> Tensor:
    """Returns (R, T) sums over l of discount^l * terms[t + l]. Sums of 2, 4, 8, ... terms need only log T steps."""
    width = 1
    while width < terms.shape[1]:
        terms = terms + discount**width * torch.nn.functional.pad(terms[:, width:], (0, width))
        width *= 2
    return terms


def moments(values: Iterable[Tensor]) -> Tensor:
    """Returns count, sum and sum of squares of all elements, (3,) float64. `whiten` takes their sums over ranks.

    Args:
        values: Tensors of any shape, with one element per token.
    """
    found = torch.zeros(3, dtype=torch.float64)
    for value in values:
        exact = value.double()
        found += torch.stack((torch.tensor(float(exact.numel())), exact.sum(), (exact**2).sum())).to(found)
    return found


def whiten(values: Sequence[Tensor], of_all: Tensor) -> list[Tensor]:
    """Shifts and scales to mean 0 and variance 1 over all tokens that `of_all` counts. Fewer than two stay unchanged.

    The variance is unbiased, and 1e-8 is added to it before the root, as in verl.

    Args:
        values: Tensors of any shape.
        of_all: (3,) `moments`, summed over ranks.

    Returns:
        Tensors of the same shapes, float32.
    """
    count, total, squares = (float(moment) for moment in of_all)
    if count < 2:
        return [value.float() for value in values]
    mean = total / count
    variance = max(squares - count * mean**2, 0.0) / (count - 1)
    return [((value.double() - mean) * (variance + VARIANCE_FLOOR) ** -0.5).float() for value in values]


class GAE(Advantage):
    """PPO's advantage per token, from a critic: `gae` with the response's reward at its last token (1707.06347).

    Stored: nothing; a replayed group's values are the present critic's. Extra passes: the critic's forward pass without
    gradient, and its forward and backward pass in training. Responses are not compared with their group, so an
    all-wrong group also teaches, and groups of one response are allowed. With gamma = lam = 1 the advantage is R - V_t
    and the return is R.

    Deviations: a KL penalty is a regularizer of the objective, not part of the reward. Whitening is over the tokens of
    a minibatch, where verl's is over those of an iteration. For replayed groups the return is that of the policy that
    sampled them, uncorrected.

    Args:
        gamma: Discount factor per token.
        lam: GAE's lambda, the weight of later temporal differences.
        whiten: Shift and scale the advantages of a minibatch to mean 0 and variance 1 over its tokens.
    """

    needs_values = True

    def __init__(self, gamma: float = 1.0, lam: float = 1.0, whiten: bool = True) -> None:
        self.gamma = within("GAE.gamma", gamma, 0, 1, "1.0")
        self.lam = within("GAE.lam", lam, 0, 1, "1.0")
        self.whitens = whiten
        self.bootstraps = lam < 1

    def __call__(self, rewards: Tensor) -> Tensor:
        """Refuses, because it needs a critic's values."""
        raise SettingError(
            "model.advantage is GAE, which needs a critic's values; set model.critic, or another advantage"
        )

    def for_group(
        self,
        group: Group,
        reward: str,
        prox_logp: Sequence[Tensor] | None = None,
        values: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Returns (T,) advantages of each response before whitening; its returns are these plus its values."""
        if values is None:
            self(group.rewards(reward)[None])
        assert values is not None
        padded = pad_sequence([value.float() for value in values], batch_first=True)
        lengths = torch.tensor([len(response.token_ids) for response in group.responses])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        is_last = torch.arange(padded.shape[1]) == lengths[:, None] - 1
        rewards = torch.where(is_last, group.rewards(reward)[:, None], 0.0)
        advantages, _ = gae(rewards, padded, mask, self.gamma, self.lam)
        return [row[:length] for row, length in zip(advantages, lengths.tolist(), strict=True)]
