"""Cost of attention relative to a layer's matrices: the constants of popo_lightning.model.packing, for this device.

Usage: python scripts/bench_attention.py [--device cpu|cuda] [--dtype bfloat16|float32] [--groups 4] [--repeats 5]

Times one layer's forward and backward pass of groups of eight responses per prompt: matrices, attention over padded
rows without a mask, over packed sequences with a dense mask, and over packed tokens. On a CPU, seconds are those of
this process. The variants are timed in turns, and medians are printed. A weight is the time of a multiplication in
attention, over all L x L pairs, divided by its time in the matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import machine
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from popo_lightning.model.attention import flat_mask, packed_attention
from popo_lightning.model.scoring import packed_mask

RESPONSES = 8

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=50)
    parser.add_argument("--response", type=int, nargs="+", default=[56, 400], help="mean tokens; each is measured")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for response in options.response:
        print(json.dumps(measure(options, response)), flush=True)
    print(json.dumps({"machine": machine(), "device": options.device, "dtype": options.dtype}))


def measure(options: argparse.Namespace, response: int) -> dict[str, Any]:
    """Milliseconds of each variant, and the weights computed from them."""
    torch.manual_seed(0)
    lengths = torch.randint(response // 3, 2 * response - response // 3, (options.groups, RESPONSES))
    segments = torch.nn.utils.rnn.pad_sequence(
        [
            torch.arange(RESPONSES + 1).repeat_interleave(torch.cat((torch.tensor([options.prompt]), row)))
            for row in lengths
        ],
        batch_first=True,
        padding_value=-1,
    ).to(options.device)
    rows, longest = options.groups * RESPONSES, options.prompt + int(lengths.max())
    dtype, width = getattr(torch, options.dtype), options.heads * options.head_dim
    packed_longest, tokens = segments.shape[1], rows * longest
    flat = flat_mask(segments)
    dense = packed_mask(segments, dtype)
    causal_inputs = _inputs(options, rows, longest, dtype)
    masked_inputs = _inputs(options, options.groups, packed_longest, dtype)
    flat_inputs = _inputs(options, 1, flat.shape[-1], dtype)
    states = torch.randn(tokens, width, device=options.device, dtype=dtype, requires_grad=True)
    matrix = torch.randn(width, 4 * width, device=options.device, dtype=dtype, requires_grad=True)
    module = torch.nn.Module()
    ways: dict[str, Callable[[], Tensor]] = {
        "matrices": lambda: states @ matrix,
        "causal": lambda: scaled_dot_product_attention(*causal_inputs, is_causal=True, enable_gqa=True),
        "masked": lambda: scaled_dot_product_attention(*_repeated(masked_inputs, options), attn_mask=dense),
        "packed": lambda: packed_attention(module, *flat_inputs, flat)[0],
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            seconds = _seconds(way, options.device)
            if repeat:
                taken[name].append(seconds)
    median = {name: statistics.median(found) for name, found in taken.items()}
    of_matrices = median["matrices"] / (2 * tokens * states.shape[1] * matrix.shape[1])
    pairs = {"causal": rows * longest**2, "masked": options.groups * packed_longest**2}
    return {
        "prompt": options.prompt,
        "response": response,
        "milliseconds": {name: round(1e3 * found, 2) for name, found in median.items()},
        "weights": {name: round(median[name] / (4 * width * count) / of_matrices, 2) for name, count in pairs.items()},
    }


def _inputs(options: argparse.Namespace, rows: int, length: int, dtype: torch.dtype) -> QueryKeyValue:
    def drawn(heads: int) -> Tensor:
        shape = (rows, heads, length, options.head_dim)
        return torch.randn(shape, device=options.device, dtype=dtype, requires_grad=True)

    return drawn(options.heads), drawn(options.key_heads), drawn(options.key_heads)


def _repeated(inputs: QueryKeyValue, options: argparse.Namespace) -> QueryKeyValue:
    """Keys and values for each head, as transformers computes attention with a mask."""
    query, key, value = inputs
    times = options.heads // options.key_heads
    return query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


def _seconds(way: Callable[[], Tensor], device: str) -> float:
    """Milliseconds of a forward and backward pass."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    way().sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
