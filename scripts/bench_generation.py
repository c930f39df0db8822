"""Speed of the transformers engine's decoding, compared with `generate` and `generate_batch` of transformers.

Usage: python scripts/bench_generation.py [--case countdown|smollm2|qwen3-0.6b ...] [--device cpu|cuda] [--repeats 2]
       [--out FILE.json]

"ours" is popo_lightning.engines.decoding.Decoder; "lock_step" is model.generate, in which a batch runs until its
longest response ends; "continuous" is model.generate_batch, transformers' continuous batching, with its manager kept
between calls. All sample the same prompts from the same untrained model in this process, one after the other in each
repeat. A fixed share of the vocabulary ends a response, so lengths are geometric up to the limit: few long responses,
many short ones. Tokens per second count the tokens of responses, not those that a batch computes besides.

Prints medians, and the ratio of ours to each of the others: the median of the repeats' ratios. For a way that does not
run on the device it prints the error.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import machine

from popo_lightning.engines.base import Sampling, prompt_seeds
from popo_lightning.engines.decoding import Decoder, Row
from popo_lightning.model.prompts import Prompt


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and for CPU and GPU the problems, prompt tokens, and mean and maximum number of tokens."""

    model: dict[str, Any]
    on_cpu: tuple[int, int, int, int]
    on_cuda: tuple[int, int, int, int]


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    """Settings of a Llama with tied embeddings."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }


CASES = {
    "countdown": Shape(llama(128, 384, 3, 4, 4, 23), (32, 16, 12, 24), (256, 16, 12, 24)),
    "smollm2": Shape(llama(576, 1536, 30, 9, 3, 49152), (3, 48, 16, 48), (32, 128, 96, 256)),
    "qwen3-0.6b": Shape(llama(1024, 3072, 28, 16, 8, 151936) | {"head_dim": 128}, (1, 32, 8, 16), (32, 256, 96, 256)),
}
GROUP = 4  # responses a problem on a CPU, and
CUDA_GROUP = 8


class Workload:
    """One case: a model, prompts, and the three ways to sample."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = CASES[name]
        problems, longest, mean, self.limit = shape.on_cuda if device.type == "cuda" else shape.on_cpu
        self.n = CUDA_GROUP if device.type == "cuda" else GROUP
        vocabulary = shape.model["vocab_size"]
        self.ends = list(range(1, 1 + max(1, vocabulary // mean)))
        config = LlamaConfig(**shape.model, pad_token_id=0, eos_token_id=self.ends, bos_token_id=None)
        self.device = device
        torch.manual_seed(0)
        with torch.device(device):
            self.model: Any = LlamaForCausalLM(config).to(dtype).eval()
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(longest // 2, longest + 1, (problems,), generator=generator).tolist()
        self.prompts = [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]

    def ours(self, seed: int) -> int:
        """Number of sampled tokens."""
        prompts = [Prompt(ids) for ids in self.prompts]
        first = prompt_seeds(seed, len(prompts))
        rows = [Row(place, first[place] + i, self.limit) for place in range(len(prompts)) for i in range(self.n)]
        ends = torch.tensor(self.ends, device=self.device)
        decoder = Decoder(self.model, prompts, Sampling(self.limit), ends, ends[:0], len(rows))
        return sum(len(each.token_ids) for found in decoder.run(rows) for each in found)

    def lock_step(self, seed: int) -> int:
        """As ours."""
        longest = max(map(len, self.prompts))
        ids = torch.stack([torch.nn.functional.pad(ids, (longest - len(ids), 0)) for ids in self.prompts])
        torch.manual_seed(seed)
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=(ids > 0).long().to(self.device),
            num_return_sequences=self.n,
            **self._settings(),
        )
        response = out[:, longest:].cpu()
        ended = torch.isin(response, torch.tensor(self.ends))
        return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, response.shape[1]).sum())

    def continuous(self, seed: int) -> int:
        """As ours."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        rows, width = len(self.prompts) * self.n, max(map(len, self.prompts)) + self.limit
        settings = ContinuousBatchingConfig(
            page_size=16,
            num_blocks=5 * rows * (width // 16 + 2) // 4,
            max_requests_per_batch=rows,
            return_logprobs=True,
            seed=seed,
        )
        generation = GenerationConfig(
            num_return_sequences=self.n, eos_token_id=self.ends, pad_token_id=0, bos_token_id=None, **self._settings()
        )
        found = self.model.generate_batch(
            [ids.tolist() for ids in self.prompts],
            generation_config=generation,
            continuous_batching_config=settings,
            persistent_manager=True,
        )
        if len(found) < rows or any(each.error for each in found.values()):
            raise RuntimeError(
                f"{len(found)} of {rows} responses came; {[e.error for e in found.values() if e.error][:1]}"
            )
        return sum(len(each.generated_tokens) for each in found.values())

    def _settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.limit, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def measure(name: str, device: torch.device, dtype: torch.dtype, repeats: int, ways: list[str]) -> dict[str, Any]:
    """Tokens per second of each way, and ours over the others'."""
    work = Workload(name, device, dtype)
    runs: dict[str, Callable[[int], int]] = {way: getattr(work, way) for way in ways}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    errors: dict[str, str] = {}
    for repeat in range(repeats + 1):  # the first warms up
        for way, run in runs.items():
            if way in errors:
                continue
            try:
                speed = _speed(run, repeat, device)
            except Exception as error:  # the failure of one way must not hide the others
                errors[way] = f"{type(error).__name__}: {error}"[:300]
                continue
            if repeat:
                speeds[way].append(speed)
    done = {way: found for way, found in speeds.items() if found and way not in errors}
    ratios = {
        way: round(statistics.median(a / b for a, b in zip(done["ours"], found, strict=True)), 3)
        for way, found in done.items()
        if way != "ours" and "ours" in done
    }
    return {
        "case": name,
        "problems": len(work.prompts),
        "responses_per_problem": work.n,
        "max_new_tokens": work.limit,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_per_second": {way: round(statistics.median(found), 1) for way, found in done.items()},
        "spread": {way: [round(min(found), 1), round(max(found), 1)] for way, found in done.items()},
        "ours_over": ratios,
        "errors": errors,
    }


def _speed(run: Callable[[int], int], seed: int, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    tokens = run(seed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (clock() - began)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), help="default: what fits the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--ways", nargs="+", default=["ours", "lock_step", "continuous"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_cuda else "float32"))
    cases = options.case or ["countdown", "qwen3-0.6b" if on_cuda else "smollm2"]
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    found = []
    for case in cases:
        found.append(measure(case, device, dtype, options.repeats, options.ways))
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()
    result = {"machine": machine("transformers"), "device": options.device, "repeats": options.repeats, "cases": found}
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
