"""Token log-probs that never hold (tokens x vocabulary) for a whole minibatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from popo_lightning.model.fused_logprobs import entropy_of, fused_logprobs, fuses
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
