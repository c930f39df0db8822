"""Token log-probs that never hold (tokens x vocabulary) for a whole minibatch.

On CUDA a plain linear head has a hand-written gradient, with which a chunk holds its logits once instead of five times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from popo_lightning.model.attention import computed_in
from popo_lightning.model.logit_form import PLAIN, LogitForm

CHUNK_ELEMENTS = 2**25  # float32 logits of one chunk: 128 MiB
# On CUDA 512 MiB, held at most twice by `fused_logprobs`: 883 rows for a vocabulary of 152k. Each chunk adds to the
# head's gradient (0.6 GiB in float32 for this vocabulary and states of 1,024), so smaller chunks are slower. Chunks
# twice as large would set the peak memory of a step for a model of 0.6B parameters.
CUDA_CHUNK_ELEMENTS = 2**27
# On a CPU glibc gets every block above 32 MiB from the kernel, page by page, and returns it. With a vocabulary of 49k
# smaller chunks take 3/4 of the time, unless they have so few rows that summing the head's gradient takes longer.
CPU_CHUNK_ELEMENTS, CPU_LEAST_ROWS = 2**23, 128


def token_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    temperature: float,
    forbidden_token_ids: Sequence[int] = (),
    entropy_gradient: bool = False,
    form: LogitForm = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Computes each target's log-prob and each distribution's entropy, in chunks that the backward pass recomputes.

    Args:
        hidden: (N, H) last hidden states, each at the position before its target.
        head: Maps hidden states to logits.
        targets: (N,) token ids.
        temperature: The sampling temperature; log-probs are those of the distribution sampled from.
        forbidden_token_ids: Tokens the engine cannot sample; they have probability 0 here, too.
        entropy_gradient: Whether the entropy must carry a gradient.
        form: The model's transformation of the head's outputs.

    Returns:
        ((N,), (N,)) float32 log-probs and entropies in nats.
    """
    weight = head.weight
    assert isinstance(weight, Tensor)
    rows = chunk_rows(weight.shape[0], hidden.device)
    if hidden.is_cuda and fuses(head) and form.cap is None:
        scaled = temperature / form.scale  # a factor before a division
        return fused_logprobs(hidden, head, targets, scaled, forbidden_token_ids, entropy_gradient, rows)

    def logits_of(hidden: Tensor) -> Tensor:
        logits = form.of(head(hidden).float())
        if temperature != 1:
            logits = logits / temperature
        if forbidden_token_ids:
            # -1e9 also gives probability 0, but with -inf 0 * log 0 would be NaN.
            logits = logits.index_fill(-1, torch.tensor(forbidden_token_ids, device=logits.device), -1e9)
        return logits

    def chunk(hidden: Tensor, targets: Tensor, known: list[Tensor]) -> tuple[Tensor, Tensor]:
        logp = logits_of(hidden).log_softmax(-1)
        if entropy_gradient:
            entropy = -(logp.exp() * logp).sum(-1)
        elif known:  # entropy has no gradient, so the backward pass need not recompute it
            entropy = known[0]
        else:
            entropy = entropy_of(logp.detach())
            known.append(entropy)
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy

    if len(targets) <= rows:
        return chunk(hidden, targets, [])
    logps, entropies = [], []
    for start in range(0, len(targets), rows):
        known: list[Tensor] = []
        part = hidden[start : start + rows], targets[start : start + rows], known
        logp, entropy = checkpoint(chunk, *part, use_reentrant=False) if torch.is_grad_enabled() else chunk(*part)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Returns the number of distributions per chunk."""
    if device.type == "cuda":
        return max(1, CUDA_CHUNK_ELEMENTS // vocabulary)
    rows, on_cpu = CHUNK_ELEMENTS // vocabulary, CPU_CHUNK_ELEMENTS // vocabulary
    return min(rows, on_cpu) if on_cpu >= CPU_LEAST_ROWS else max(1, rows)


# -- with a hand-written gradient ------------------------------------------------------------------------------------


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
    """Computes :func:`token_logprobs`, with the same gradients up to rounding.

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
