"""How many sequences and tokens vLLM computes in a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from popo_lightning.engines.base import EngineContext

MAX_SEQUENCES = 1024
LARGE_CARD, LARGEST_CARD = 70 * 2**30, 160 * 2**30  # bytes


@dataclass(frozen=True)
class Batch:
    """The largest step.

    Args:
        sequences: Maximum number of sequences in a step (max_num_seqs).
        tokens: Maximum number of tokens in a step (max_num_batched_tokens).
    """

    sequences: int
    tokens: int


def own_batch(card: int, name: str) -> Batch:
    """Defaults of vLLM's class LLM (get_batch_defaults in vllm/engine/arg_utils.py).

    Args:
        card: Bytes of the GPU.
        name: Its name. An A100 is treated as a small card.
    """
    large = card >= LARGEST_CARD or (card >= LARGE_CARD and "a100" not in name.lower())
    return Batch(1024, 16384) if large else Batch(256, 8192)


def batch_of(setting: int | None, responses: int, card: int, name: str) -> Batch:
    """The largest step on a GPU: enough for the responses of an iteration, and no less than vLLM's own.

    Args:
        setting: data.engine.max_num_seqs.
        responses: Responses that the rank samples in an iteration.
        card: Bytes of the GPU.
        name: Its name.
    """
    own = own_batch(card, name)
    return Batch(setting or max(own.sequences, min(MAX_SEQUENCES, responses)), own.tokens)


def sequences_at_once(setting: int | None, context: EngineContext) -> int | None:
    """The argument max_num_seqs of vLLM; None leaves it to vLLM.

    Args:
        setting: data.engine.max_num_seqs.
        context: Context with the device and the responses of an iteration.
    """
    if setting is not None or context.responses is None or context.device.type != "cuda":
        return setting
    card = torch.cuda.get_device_properties(context.device)
    return batch_of(None, context.responses, card.total_memory, card.name).sequences
