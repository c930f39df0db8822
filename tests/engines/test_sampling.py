"""Tokens drawn from given uniform numbers follow the softmax exactly. A token without probability is never drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from popo_lightning.engines.base import Sampling
from popo_lightning.engines.sampling import draw, uniforms

NONE = torch.empty(0, dtype=torch.long)
ONE = Sampling(1)


def drawn(logits: Tensor, uniform: Tensor, sampling: Sampling = ONE, forbidden: Tensor = NONE) -> tuple[Tensor, Tensor]:
    rows = logits.expand(len(uniform), -1).clone()
    return draw(rows, uniform, sampling, forbidden)


@pytest.mark.parametrize("size", [1, 5, 64, 65, 1000, 4097])
def test_every_number_gives_the_token_whose_share_it_lies_in(size: int) -> None:
    """Compares with a float64 cumulative sum over the whole vocabulary, at the middle of every token's share.

    Weights are float32, so shares of less than 1 in 100,000 may be slightly misplaced.
    """
    logits = 2 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    shares = logits.double().softmax(-1)
    ends = shares.cumsum(-1)
    tokens, logps = drawn(logits, ends - shares / 2)
    large = shares > 1e-5
    assert int(large.sum()) > 0.6 * size
    assert tokens[large].tolist() == large.nonzero()[:, 0].tolist()
    torch.testing.assert_close(logps, logits.log_softmax(-1)[tokens], atol=2e-6, rtol=0)


def test_frequencies_are_the_softmax() -> None:
    """Chi-square of 200,000 draws with 29 degrees of freedom: 58.3 is exceeded once in a thousand."""
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    uniform = uniforms([7], 200_000)[0]
    for temperature in (1.0, 0.6):
        expected = (logits.double() / temperature).softmax(-1) * len(uniform)
        tokens, _ = drawn(logits, uniform, Sampling(1, temperature))
        counts = tokens.bincount(minlength=30).double()
        assert float(((counts - expected) ** 2 / expected).sum()) < 58.3


@pytest.mark.parametrize("size", [24, 151_936])
def test_numbers_at_the_ends_give_tokens_that_may_be_drawn(size: int) -> None:
    """The first and the last tokens and every third one are forbidden. Rounding must not allow one of them."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1))
    forbidden = torch.cat((torch.arange(0, size, 3), torch.arange(size - 5, size))).unique()
    uniform = torch.tensor([0.0, 5e-324, 2**-60, 1 - 2**-53, 1 - 2**-40], dtype=torch.float64)
    tokens, logps = drawn(logits, uniform, forbidden=forbidden)
    allowed = sorted(set(range(size)) - set(forbidden.tolist()))
    assert tokens[:3].tolist() == [allowed[0]] * 3 and tokens[3:].tolist() == [allowed[-1]] * 2
    assert bool(logps.isfinite().all())


def test_a_forbidden_token_takes_no_probability() -> None:
    logits = torch.tensor([9.0, 0.0, 1.0])
    tokens, logps = drawn(logits, uniforms([0], 1000)[0], forbidden=torch.tensor([0]))
    assert set(tokens.tolist()) == {1, 2}
    torch.testing.assert_close(logps, logits[1:].log_softmax(-1)[tokens - 1])


def test_a_large_vocabulary_loses_nothing() -> None:
    """Shares are 1 in 151,936. If they were summed in float32, the last tokens would be drawn too often or never."""
    size = 151_936
    uniform = (torch.arange(size, dtype=torch.float64)[-50:] + 0.5) / size
    tokens, _ = drawn(torch.zeros(size), uniform)
    assert tokens.tolist() == list(range(size - 50, size))


def test_tails_beyond_the_numbers_of_a_float() -> None:
    logits = torch.tensor([-2e4, 0.0, -60.0, -torch.inf, -2e4])
    tokens, logps = drawn(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 1, 1] and logps.tolist() == [0.0, 0.0, 0.0]


def test_greedy_and_cut_tails() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    uniform = uniforms([3], 500)[0]
    tokens, logps = drawn(logits, uniform[:2], Sampling(1, temperature=0.0))
    assert tokens.tolist() == [1, 1]
    torch.testing.assert_close(logps, logits.log_softmax(-1)[tokens])
    tokens, logps = drawn(logits, uniform, Sampling(1, top_k=2))
    assert set(tokens.tolist()) == {1, 3}
    torch.testing.assert_close(logps, logits[[1, 3]].log_softmax(-1)[(tokens - 1) // 2])
    tokens, _ = drawn(logits, uniform, Sampling(1, top_p=0.7))  # the largest shares are 0.64 and 0.24
    assert set(tokens.tolist()) == {1, 3}


def test_numbers_belong_to_their_seed() -> None:
    """A seed's numbers do not depend on other seeds or the count. They neither read nor change random states."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    together = uniforms([5, 2**62 + 3, 6], 40)
    after = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    assert states[:2] == after[:2] and torch.equal(states[2], after[2])
    assert torch.equal(uniforms([2**62 + 3], 10)[0], together[1, :10])
    assert not torch.equal(together[0], together[2])
    assert together.dtype == torch.float64 and float(together.min()) >= 0 and float(together.max()) < 1
