"""The plan's memory estimate, compared with the peak of a training step.

Usage: python scripts/bench_plan.py [--out benchmarks/plan.json] [--device cpu|cuda] [--hidden 512] [--layers 8]
       [--tokens 1024 2048]

Each point is a process of its own. In it a random Llama in float32 takes two steps of AdamW on one micro-batch of
responses, the second with the optimizer's state in place, by popo_lightning.model.scoring. Memory is counted from
before the model exists: resident memory on a CPU, memory allocated by torch on CUDA. The estimate is that of
`popo fit --plan` for one process whose engine is elsewhere, without CUDA's context.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_memory import peak, reset_peak
from machine import machine

from popo_lightning.cli.plan.memory import Model, estimate
from popo_lightning.cli.plan.optimizer_state import OptimizerState
from popo_lightning.cli.plan.run_settings import RunSettings
from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Row
from popo_lightning.model.padded_rows import PaddedRows, pad_rows
from popo_lightning.model.scoring import response_logprobs

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "plan.json"
PROMPT, SEQUENCE = 64, 512


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help=f"multiples of {SEQUENCE}")
    parser.add_argument("--point", choices=("kept", "recomputed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options)))
        return
    model = Model(config_of(options), "random")
    points = [point(options, model, tokens, kind) for tokens in options.tokens for kind in ("kept", "recomputed")]
    found = {"machine": machine(), "device": options.device, "points": points}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def point(options: argparse.Namespace, model: Model, tokens: int, kind: str) -> dict[str, Any]:
    """Makes one measurement in a process of its own, and adds the estimate."""
    shape = [f"--{name}={getattr(options, name)}" for name in ("device", "hidden", "layers", "vocabulary")]
    command = [sys.executable, __file__, *shape, f"--tokens={tokens}", f"--point={kind}"]
    # freed memory returns to the kernel at once, as in the estimate
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    run = RunSettings(
        on_gpu=options.device == "cuda",
        optimizer=OptimizerState(8.0, int(options.device == "cuda")),
        micro_batch_tokens=tokens,
        prompt_tokens=PROMPT,
        response_tokens=SEQUENCE - PROMPT,
        gradient_checkpointing=kind == "recomputed",
    )
    memory = estimate(run, model, None)
    expected = max(memory.peaks.values()) - memory.always["CUDA context and libraries"]
    found |= {"tokens": tokens, "activations": kind, "estimate": expected}
    found["ratio"] = round(found["bytes"] / found["estimate"], 3)
    print(json.dumps(found), flush=True)
    return found


def config_of(options: argparse.Namespace) -> Any:
    """Builds a Llama of the usual proportions."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        tie_word_embeddings=True,
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of two steps, above the memory before the model."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    small = LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    two_steps(small, options, random_rows(1, 16))  # libraries load their own memory
    rows = random_rows(options.tokens[0] // SEQUENCE, options.vocabulary)
    before = reset_peak(options.device)
    parameters = two_steps(config_of(options), options, rows)
    return {"bytes": peak(options.device) - before, "parameters": parameters}


def two_steps(config: Any, options: argparse.Namespace, rows: PaddedRows) -> int:
    """Trains a new model on one micro-batch twice, and returns its number of parameters."""
    from transformers import LlamaForCausalLM

    with torch.device(options.device):
        model = LlamaForCausalLM(config).train()
    if options.point == "recomputed":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    here = rows.to(torch.device(options.device))
    for _ in range(2):
        optimizer.zero_grad()
        logp, _ = response_logprobs(model, here, 1.0, (), False)
        logp.mean().neg().backward()
        optimizer.step()
    return sum(p.numel() for p in model.parameters())


def random_rows(count: int, vocabulary: int) -> PaddedRows:
    """Rows of full length."""
    length = SEQUENCE - PROMPT
    rows = []
    for index in range(count):
        prompt, response = torch.randint(vocabulary, (PROMPT,)), torch.randint(vocabulary, (length,))
        rows.append(Row(index, prompt, Response(response, torch.zeros(length), "length")))
    return pad_rows(rows)


if __name__ == "__main__":
    main()
