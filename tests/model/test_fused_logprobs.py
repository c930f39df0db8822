"""Log-probs with an explicit gradient, compared with the plain pass that torch differentiates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from popo_lightning.model import logprobs
from popo_lightning.model.logprobs import fused_logprobs, fuses

STATES, WIDTH, VOCABULARY = 23, 16, 50


def made(bias: bool, dtype: torch.dtype = torch.float32, eighths: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    """Returns a head, states and targets. In eighths, logits are equal in any order of summation, until rounded."""
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        found = torch.randn(shape, generator=draw)
        return (8 * found).round() / 8 if eighths else found

    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(values(*parameter.shape))
    hidden = values(STATES, WIDTH).to(dtype)
    return head, hidden, torch.randint(VOCABULARY - 3, (STATES,), generator=draw)


def gradients(head: nn.Linear, hidden: Tensor, score: Any, entropy_weight: float) -> list[Tensor]:
    """Returns log-probs, entropies, and the gradients of states and head."""
    head.zero_grad()
    states = hidden.clone().requires_grad_()
    logp, entropy = score(states, head)
    assert logp.dtype == entropy.dtype == torch.float32 and logp.shape == entropy.shape == (len(hidden),)
    of_logp, of_entropy = torch.linspace(-1, 2, len(hidden)), entropy_weight * torch.linspace(1, 2, len(hidden))
    (logp * of_logp + entropy * of_entropy).sum().backward()
    assert states.grad is not None
    return [logp.detach(), entropy.detach(), states.grad, *(p.grad for p in head.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize(("temperature", "forbidden"), [(1.0, ()), (0.6, (48, 49)), (1.7, (0,))])
def test_values_and_gradients_are_the_plain_ones(
    rows: int, bias: bool, entropy_gradient: bool, temperature: float, forbidden: tuple[int, ...]
) -> None:
    head, hidden, targets = made(bias)
    targets[: len(forbidden[:1])] = torch.tensor(forbidden[:1], dtype=torch.long)  # a forbidden target gets no gradient
    settings = (targets, temperature, forbidden, entropy_gradient)
    weight = 0.7 if entropy_gradient else 0.0
    found = gradients(head, hidden, lambda states, head: fused_logprobs(states, head, *settings, rows), weight)
    expected = gradients(head, hidden, lambda states, head: logprobs.token_logprobs(states, head, *settings), weight)
    assert len(found) == len(expected) == (5 if bias else 4)
    for mine, plain in zip(found, expected, strict=True):
        assert plain.norm() > 1
        torch.testing.assert_close(mine, plain, atol=2e-5, rtol=2e-5)


def test_without_its_gradient_the_entropy_carries_none() -> None:
    head, hidden, targets = made(False)
    for wanted in (False, True):
        logp, entropy = fused_logprobs(hidden, head, targets, 1.0, (), wanted, 7)
        assert logp.requires_grad and entropy.requires_grad == wanted
    with torch.no_grad():
        assert not fused_logprobs(hidden, head, targets, 1.0, (), True, 7)[0].requires_grad


def test_a_tied_head_and_frozen_parts() -> None:
    """Gradients through the head add to those through the embedding. Frozen parts get none."""
    head, _, targets = made(False)
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    embedding.weight = head.weight

    def found(score: Any) -> Tensor:
        head.weight.grad = None
        score(embedding(targets), head)[0].square().sum().backward()
        assert head.weight.grad is not None
        return head.weight.grad

    mine = found(lambda states, head: fused_logprobs(states, head, targets.flip(0), 0.8, (), False, 7))
    plain = found(lambda states, head: logprobs.token_logprobs(states, head, targets.flip(0), 0.8))
    assert plain.norm() > 1 and (mine - plain).norm() < 1e-5 * plain.norm()  # sums whose large terms cancel
    head.weight.requires_grad_(False)
    states = torch.randn(STATES, WIDTH, requires_grad=True)
    fused_logprobs(states, head, targets, 1.0, (), False, 7)[0].sum().backward()
    assert head.weight.grad is not None and torch.equal(head.weight.grad, plain)
    assert states.grad is not None and states.grad.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_rounds_logits_as_the_plain_pass_does(dtype: torch.dtype) -> None:
    """Float32 weights under autocast and bfloat16 weights give the same log-probs, and no worse gradients."""
    head, hidden, targets = made(True, dtype, eighths=True)
    in_float32, states, _ = made(True, eighths=True)
    exact = gradients(in_float32, states, lambda s, head: logprobs.token_logprobs(s, head, targets, 1.0), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        found = gradients(head, hidden, lambda s, head: fused_logprobs(s, head, targets, 1.0, (), False, 7), 0)
        plain = gradients(head, hidden, lambda s, head: logprobs.token_logprobs(s, head, targets, 1.0), 0)
    torch.testing.assert_close(found[:2], plain[:2], atol=2e-6, rtol=1e-6)
    for mine, other, true in zip(found[2:], plain[2:], exact[2:], strict=True):
        assert mine.dtype == other.dtype
        assert 0 < (mine.float() - true).norm() < 1.5 * (other.float() - true).norm() < 0.1 * true.norm()


def test_a_chunk_holds_its_logits_once_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain pass holds logits, log-probs and both gradients. Here the backward pass works in place."""
    seen: list[int] = []
    real = logprobs._d_logits

    def spy(logp: Tensor, *others: Any) -> Tensor:
        found = real(logp, *others)
        seen.append(len(logp))
        assert found.data_ptr() == logp.data_ptr()
        return found

    monkeypatch.setattr(logprobs, "_d_logits", spy)
    head, hidden, targets = made(False)
    gradients(head, hidden, lambda states, head: fused_logprobs(states, head, targets, 1.0, (), False, 10), 0)
    assert seen == [10, 10, 3]


class HeadCasts(TorchDispatchMode):
    """Counts conversions of tensors of the head's size to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        casts = function is torch.ops.aten._to_copy.default and args[0].numel() == VOCABULARY * WIDTH
        self.count += casts
        return function(*args, **kwargs or {})


def test_each_pass_casts_the_head_once() -> None:
    """Two copies of a large vocabulary's head at the same time would be gigabytes."""
    head, hidden, targets = made(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = fused_logprobs(hidden.requires_grad_(), head, targets, 1.0, (), False, 7)
    with HeadCasts() as casts:
        logp.sum().backward()
    assert casts.count == 1


def test_only_plain_heads_are_fused() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    assert fuses(nn.Linear(3, 4)) and not fuses(Scaled(3, 4)) and not fuses(nn.Sequential(nn.Linear(3, 4)))
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        head = nn.Linear(3, 4)
        getattr(head, register)(lambda *args: None)
        assert not fuses(head)


def test_no_state_gives_nothing() -> None:
    head, hidden, targets = made(False)
    logp, entropy = fused_logprobs(hidden[:0], head, targets[:0], 1.0, (), False, 7)
    assert logp.shape == entropy.shape == (0,)
