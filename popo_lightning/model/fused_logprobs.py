"""Log-probs of a linear head with a hand-written gradient. A chunk holds its logits once instead of five times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from popo_lightning.model.attention import computed_in


def fuses(head: nn.Module) -> bool:
    """Returns whether a head is a plain linear layer with whole weights.

    A subclass, a hook or a sharded weight may compute something that this file does not.
    """
    return (
        type(head) is nn.Linear
        and not isinstance(head.weight, DTensor)
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and not head._backward_hooks
    )


def fused_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    temperature: float,
    forbidden_token_ids: Sequence[int],
    entropy_gradient: bool,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Computes `logprobs.token_logprobs`, with the same gradients up to rounding.

    Args:
        hidden: (N, H) last hidden states, each at the position before its target.
        head: A head that `fuses`.
        targets: (N,) token ids.
        temperature: The sampling temperature.
        forbidden_token_ids: Tokens the engine cannot sample.
        entropy_gradient: Whether the entropy must carry a gradient.
        rows: Number of rows per chunk.

    Returns:
        ((N,), (N,)) float32 log-probs and entropies in nats.
    """
    device = hidden.device
    dtype = computed_in(device, hidden.dtype)
    forbidden = torch.tensor(forbidden_token_ids, dtype=torch.long, device=device)
    found: Any = _HeadLogProbs.apply(
        hidden.to(dtype), head.weight, head.bias, targets, forbidden, temperature, entropy_gradient, rows
    )
    logp, entropy = found
    return logp, entropy if entropy_gradient else entropy.detach()


class _HeadLogProbs(torch.autograd.Function):
    """Computes log-probs and entropies of targets from states and head. The backward pass recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        forbidden: Tensor,
        temperature: float,
        entropy_gradient: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets, forbidden)
        ctx.temperature, ctx.entropy_gradient, ctx.rows = temperature, entropy_gradient, rows
        logps, entropies = [], []
        for part, logp in _chunks(hidden, weight.to(hidden.dtype), bias, forbidden, temperature, rows):
            logps.append(logp.gather(-1, targets[part, None]).squeeze(-1))
            entropies.append(entropy_of(logp))
        return torch.cat(logps), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """d_logit = (p (d_entropy (-log p - entropy) - d_logp) + d_logp at the target) / temperature."""
        hidden, weight, bias, targets, forbidden = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Always in float32, because a sum over many chunks would lose more precision than each chunk.
        d_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros(bias.shape, device=bias.device) if bias is not None and ctx.needs_input_grad[2] else None
        for part, logp in _chunks(hidden, cast, bias, forbidden, ctx.temperature, ctx.rows):
            entropy = entropy_of(logp) if ctx.entropy_gradient else None
            d_logits = _d_logits(logp, targets[part], d_logp[part], d_entropy[part], entropy)
            if len(forbidden):
                d_logits.index_fill_(-1, forbidden, 0.0)
            d_logits = d_logits.div_(ctx.temperature).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, cast, out=d_hidden[part])
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[part]
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=torch.float32)
        grads = (d_hidden, *(None if d is None else d.to(weight.dtype) for d in (d_weight, d_bias)))
        return (*grads, None, None, None, None, None)


def _chunks(
    hidden: Tensor, cast: Tensor, bias: Tensor | None, forbidden: Tensor, temperature: float, rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the N rows with their (rows, V) float32 log-probs, which the caller may overwrite.

    cast is the head's weight in the dtype of the states.
    """
    added = None if bias is None else bias.to(hidden.dtype)
    for start in range(0, max(len(hidden), 1), rows):
        part = slice(start, start + rows)
        logits = nn.functional.linear(hidden[part], cast, added).float()
        if temperature != 1:
            logits.div_(temperature)
        if len(forbidden):
            logits.index_fill_(-1, forbidden, -1e9)  # probability 0, but 0 * log 0 is not NaN
        yield part, logits.sub_(logits.logsumexp(-1, keepdim=True))


def entropy_of(logp: Tensor) -> Tensor:
    """Returns (N,) entropies in nats of (N, V) log-probs, without gradient, with one further (N, V) tensor."""
    return -logp.exp().mul_(logp).sum(-1)


def _d_logits(logp: Tensor, targets: Tensor, d_logp: Tensor, d_entropy: Tensor, entropy: Tensor | None) -> Tensor:
    """Returns (N, V) gradients of the logits, which overwrite the log-probs unless the entropy has a gradient."""
    if entropy is None:
        found = logp.exp_().mul_(-d_logp[:, None])
    else:
        slope = (logp + entropy[:, None]).mul_(-d_entropy[:, None]).sub_(d_logp[:, None])
        found = logp.exp_().mul_(slope)
    return found.scatter_add_(-1, targets[:, None], d_logp[:, None])
