"""Splits rows into forward passes, with a group's prompt computed once where that is exact and cheaper.

Several responses to one prompt can follow a single copy of it in one sequence: positions restart after the prompt, and
a mask lets a response see the prompt and itself. If attention computes only what the mask shows (`attention.py`), this
saves the prompt's other copies and costs nothing. If it computes all pairs of a sequence and discards masked ones, the
cost decides which responses share a prompt:

    a sequence of L tokens costs  linear L + attention L^2

in one layer, in multiplications and additions of the forward pass. The backward pass costs twice as much, and all
layers cost the same. The cost per response token is lowest with about sqrt(P (linear / attention + P)) response tokens
behind a prompt of P tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from inspect import signature
from math import isqrt
from typing import Any

import torch

from popo_lightning.core.minibatch import Row
from popo_lightning.model.attention import PACKED

# Maximum entries of one pass's mask, 256 MiB in float32. Each pass makes one, which layers and heads share.
MASK_ENTRIES = 2**26
# Attention implementations that take a given mask; flash attention takes none.
MASKED_ATTENTION = ("sdpa", "eager", PACKED)
# Minimum width of heads in flex_attention's kernels.
MIN_WIDTH = 16
# Rotary embeddings whose angles depend only on a token's position, not on the length of the pass's texts.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# Settings with which tokens affect others by means other than attention to all earlier tokens.
WINDOWS = ("sliding_window", "attention_window_size")
OTHER_REACH = (
    "attention_chunk_size",
    "keep_window_size",
    "index_topk",
    "index_topk_blocks",
    "alibi",
    "block_types",
    "layers_block_type",
    "conv_L_cache",
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
    "use_bidirectional_attention",
)


def shares_prompts(model: Any) -> bool:
    """Returns true only for models known to give identical outputs for packed and separate rows.

    Such a model is a text decoder in which every layer attends to all earlier tokens, under a given mask, and whose
    only positional information is rotary embeddings at given position ids.

    Args:
        model: A transformers model without its output head.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        ignores_right_padding(model)
        and config._attn_implementation in MASKED_ATTENTION
        and attends_to_all(config)
        and rope.get("rope_type") in STATIC_ROPE
        and "position_ids" in signature(model.forward).parameters
    )


def attends_to_all(config: Any) -> bool:
    """Returns whether each layer reads all earlier tokens by attention, and none in another way."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not any(getattr(config, name, None) for name in (*WINDOWS, *OTHER_REACH))


def takes_packed_tokens(model: Any) -> bool:
    """Returns whether `attention.packed_attention` is exact for a model, with its output head or without."""
    config = model.config
    width = getattr(config, "head_dim", None) or 0
    if not width and getattr(config, "num_attention_heads", None):
        width = config.hidden_size // config.num_attention_heads
    return (
        shares_prompts(model.base_model)
        and config._attn_implementation == "sdpa"
        and type(model)._supports_attention_backend  # calls the registered attention, not its own code
        and not getattr(config, "attn_logit_softcapping", None)
        and (width >= MIN_WIDTH or not torch.cuda.is_available())
    )


def ignores_right_padding(model: Any) -> bool:
    """Returns true only for models known to give right-padded rows the same outputs without a padding mask.

    Such a model is a text decoder whose layers attend backwards only, at most within a window, and which has rotary
    position embeddings. Learned positions, or distances added to scores, may be counted from the mask.

    Args:
        model: A transformers model without its output head.
    """
    config = model.config
    return (
        not config.is_encoder_decoder
        and getattr(config, "is_causal", True)
        and not getattr(config, "sub_configs", None)  # models of several parts, such as those that see images
        and set(getattr(config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
        and not any(getattr(config, name, None) for name in OTHER_REACH)
        and bool(getattr(config, "rope_parameters", None))
    )


@dataclass(frozen=True)
class PairWeights:
    """Time of a multiplication in attention relative to one in a layer's matrices, over all L^2 pairs.

    Args:
        causal: Relative time without a mask.
        masked: Relative time with a mask for each sequence.
    """

    causal: float
    masked: float


# The CPU's weights lie between those that scripts/bench_attention.py measures for responses of 56 and 300 tokens:
# causal 7.3 and 3.0, masked 3.6 and 2.7. CUDA's are estimates for a kernel that skips later tokens and one that reads a
# mask.
PAIR_WEIGHTS = {"cpu": PairWeights(4.0, 3.0), "cuda": PairWeights(1.5, 7.0)}


@dataclass(frozen=True)
class LayerCosts:
    """Cost of a sequence in one layer, in multiplications and additions of the forward pass.

    Args:
        linear: Cost of a token: 2 x the parameters that it passes through.
        causal: Cost of a pair of tokens if no sequence of a pass has a mask: 4 x the width of all heads, for scores and
            weighted sum, and weighted.
        masked: Cost of a pair of tokens if a sequence of the pass has a mask.
        flat: Whether passes have no padding and attention computes nothing that a mask hides.
    """

    linear: float
    causal: float
    masked: float
    flat: bool = False

    def of(self, length: int, masked: bool) -> float:
        """Returns the cost of a sequence of which attention computes all pairs."""
        return length * (self.linear + (self.masked if masked else self.causal) * length)

    @classmethod
    def of_model(cls, config: Any, device: str = "cpu") -> LayerCosts:
        """Returns the costs of grouped attention and a gated feed-forward layer. Experts count as one expert.

        Args:
            config: Configuration of a transformers model.
            device: Type of the computing device; all but "cpu" count as CUDA.
        """
        hidden, heads = config.hidden_size, config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or hidden // heads)
        keys = width * (getattr(config, "num_key_value_heads", None) or heads) // heads
        feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
        parameters = hidden * (2 * width + 2 * keys + 3 * feed_forward)
        weights = PAIR_WEIGHTS["cpu" if device == "cpu" else "cuda"]
        pair, flat = 4.0 * width, config._attn_implementation == PACKED
        return cls(2.0 * parameters, pair * weights.causal, pair * weights.masked, flat)


Rows = list[Row]  # rows of one sequence, behind one copy of their prompt


def micro_batches(rows: Sequence[Row], token_budget: int, costs: LayerCosts | None = None) -> list[list[Rows]]:
    """Splits rows into passes of at most ``token_budget`` padded tokens, each a list of sequences.

    A row longer than the budget gets its own pass. The same lengths are always split in the same way, and the loss does
    not depend on the split, because its denominator is the minibatch's.

    Args:
        rows: Rows of a minibatch.
        token_budget: Maximum tokens of one pass: S x L with padding, or without padding if passes have none.
        costs: Costs of a model that shares prompts; None makes each row a sequence.
    """
    if costs is not None and costs.flat:
        return _filled(_packed(rows, token_budget, _length), lambda sequences: _total(sequences) <= token_budget)
    apart = _filled([[row] for row in rows], lambda sequences: _padded(sequences) <= token_budget)
    if costs is None:
        return apart
    longest = min(token_budget, isqrt(MASK_ENTRIES))
    packed = _packed(rows, longest, lambda sequence: costs.of(_length(sequence), len(sequence) > 1))
    filled = _filled(packed, lambda sequences: _padded(sequences) <= token_budget and _mask_fits(sequences))
    return min(apart, filled, key=lambda passes: sum(_cost(each, costs) for each in passes))


def _filled(sequences: Sequence[Rows], fits: Callable[[Sequence[Rows]], bool]) -> list[list[Rows]]:
    """Fills each pass with sequences as far as its bounds allow, longest first, so that a pass has little padding."""
    passes: list[list[Rows]] = []
    for sequence in sorted(sequences, key=_length, reverse=True):
        if passes and fits([*passes[-1], sequence]):
            passes[-1].append(sequence)
        else:
            passes.append([sequence])
    return passes


def _total(sequences: Sequence[Rows]) -> int:
    return sum(map(_length, sequences))


def _padded(sequences: Sequence[Rows]) -> int:
    """Number of tokens of a pass, whose first sequence is the longest."""
    return len(sequences) * _length(sequences[0])


def _masked(sequences: Sequence[Rows]) -> bool:
    return any(len(rows) > 1 for rows in sequences)  # one packed sequence is enough for the pass to have a mask


def _mask_fits(sequences: Sequence[Rows]) -> bool:
    return not _masked(sequences) or _padded(sequences) * _length(sequences[0]) <= MASK_ENTRIES


def _cost(sequences: Sequence[Rows], costs: LayerCosts) -> float:
    """Returns the cost of a pass."""
    return len(sequences) * costs.of(_length(sequences[0]), _masked(sequences))


def _length(rows: Rows) -> int:
    return len(rows[0].prompt_ids) + sum(len(row.response.token_ids) for row in rows)


def _packed(rows: Sequence[Row], longest: int, cost: Callable[[Rows], float]) -> list[Rows]:
    """Puts rows with the same prompt into sequences, as many per prompt as cost the least.

    Args:
        rows: Rows of a minibatch.
        longest: Maximum tokens of a sequence of several rows.
        cost: Cost of a sequence.
    """
    by_prompt: dict[Any, Rows] = {}
    for row in rows:
        key = row.index if row.images else tuple(row.prompt_ids.tolist())
        by_prompt.setdefault(key, []).append(row)
    found: list[Rows] = []
    for same in by_prompt.values():
        counts = (_dealt(same, count) for count in range(1, len(same) + 1))
        fitting = [dealt for dealt in counts if len(dealt) == len(same) or max(map(_length, dealt)) <= longest]
        found += min(fitting, key=lambda dealt: sum(map(cost, dealt)))
    return found


def _dealt(rows: Sequence[Row], count: int) -> list[Rows]:
    """Distributes rows over sequences of about equal length: each row, longest first, goes to the shortest sequence."""
    dealt: list[Rows] = [[] for _ in range(count)]
    shortest = [(0, 0, number) for number in range(count)]  # (tokens, rows, sequence); rows count empty responses
    for row in sorted(rows, key=lambda row: len(row.response.token_ids), reverse=True):
        tokens, behind, number = shortest[0]
        dealt[number].append(row)
        heapreplace(shortest, (tokens + len(row.response.token_ids), behind + 1, number))
    return dealt
