"""Token log-probs without ever holding (tokens x vocabulary) for a whole minibatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from popo_lightning.model.fused_logprobs import fused_logprobs, fuses
from popo_lightning.model.logit_form import PLAIN, LogitForm

CHUNK_ELEMENTS = 2**25  # float32 logits of one chunk: 128 MiB
# On CUDA 512 MiB, held twice at most by `fused_logprobs`: 883 rows of a vocabulary of 152k. Each chunk adds to the
# head's gradient, 0.6 GiB in float32 for such a vocabulary and states of 1,024, so that fewer rows take longer; twice
# as many would be the peak of a step of a model of 0.6B parameters.
CUDA_CHUNK_ELEMENTS = 2**27
# On a CPU glibc gets every block above 32 MiB from the kernel, page by page, and gives it back: with 49k tokens chunks
# below that take 3/4 of the time. Not with so few rows that adding up the head's gradient chunk by chunk takes longer.
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
    """Log-prob of each target and entropy of each distribution, in chunks that are recomputed in the backward pass.

    Args:
        hidden: (N, H) last hidden states, each at the position before its target.
        head: Maps hidden states to logits.
        targets: (N,) token ids.
        temperature: The sampling temperature; log-probs are those of the distribution sampled from.
        forbidden_token_ids: Tokens the engine cannot sample; they take no probability here either.
        entropy_gradient: Whether the entropy must carry a gradient.
        form: What the model does to the head's outputs.

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
            # -1e9 rather than -inf: probability 0 all the same, and 0 * log 0 stays a number
            logits = logits.index_fill(-1, torch.tensor(forbidden_token_ids, device=logits.device), -1e9)
        return logits

    def chunk(hidden: Tensor, targets: Tensor, known: list[Tensor]) -> tuple[Tensor, Tensor]:
        logp = logits_of(hidden).log_softmax(-1)
        if entropy_gradient:
            entropy = -(logp.exp() * logp).sum(-1)
        elif known:  # the backward pass recomputes what has a gradient, and entropy has none
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
    """How many distributions a chunk has."""
    if device.type == "cuda":
        return max(1, CUDA_CHUNK_ELEMENTS // vocabulary)
    rows, on_cpu = CHUNK_ELEMENTS // vocabulary, CPU_CHUNK_ELEMENTS // vocabulary
    return min(rows, on_cpu) if on_cpu >= CPU_LEAST_ROWS else max(1, rows)


def entropy_of(logp: Tensor) -> Tensor:
    """(N,) entropies in nats of (N, V) log-probs, without a gradient: one further (N, V) is held, not two."""
    return -logp.exp().mul_(logp).sum(-1)
