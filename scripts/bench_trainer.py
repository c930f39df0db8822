"""Tokens per second, MFU and peak memory of a training step: random weights of Qwen3-0.6B's shape, long sequences.

Usage: python scripts/bench_trainer.py [--out benchmarks/trainer.json] [--device cpu|cuda] [--seconds 170]
       [--model '{"attention": "flex"}'] [--points 16k 64k ...] [--small]

Each point is a process of its own: Trainer.fit on synthetic minibatches (random prompts and responses, advantages of
1 and -1), so a step is PolicyModule's own: forward and backward passes of one sequence each, clipping, AdamW. The
first steps warm up. --model takes further arguments of PolicyModule. --small uses a tiny shape, to try the script.
Points for which --seconds leaves no time are listed as left out.

MFU is computed as in prime-rl, so that the figures are comparable. FLOPs of a token are

    6 x (parameters of all matrices and of the head) + 12 x layers x hidden size x tokens of the sequence,

divided by the card's bf16 peak without sparsity. This ignores recomputation and the half that causal attention skips,
and takes the hidden size as the width of all heads (which is half of that width for Qwen3-0.6B).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from machine import machine
from torch.utils.data import DataLoader

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.policy import PolicyModule

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "trainer.json"
# Qwen3-0.6B; positions as many as the longest sequence needs.
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": True,
}
TINY = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | {
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32
}  # fmt: skip
PROMPT = 256
# Rows of a step, one per pass (prime-rl takes two passes per step); steps after the warm-up.
POINTS: dict[str, dict[str, Any]] = {
    "16k": {"tokens": 16_384, "rows": 2, "recompute": True, "warm_up": 2, "steps": 4},
    "64k": {"tokens": 65_536, "rows": 1, "recompute": True, "warm_up": 1, "steps": 3},
    "16k without recomputation": {"tokens": 16_384, "rows": 2, "recompute": False, "warm_up": 2, "steps": 4},
    "16k compiled": {"tokens": 16_384, "rows": 2, "recompute": True, "compile": True, "warm_up": 2, "steps": 4},
    "64k compiled": {"tokens": 65_536, "rows": 1, "recompute": True, "compile": True, "warm_up": 1, "steps": 3},
}
# prime-rl at 559b447, benchmarks/baselines, 1 x H100, full fine-tuning, recomputation, flash attention 3.
PUBLISHED = {
    "16k": {"tokens_per_second": 11_896, "mfu": 0.1108, "peak_gib": 12.53},
    "64k": {"tokens_per_second": 10_147, "mfu": 0.268, "peak_gib": 19.6},
}
PEAKS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--seconds", type=float, default=170.0, help="after which no further point begins")
    parser.add_argument("--model", type=json.loads, default={}, help="further arguments of PolicyModule, as JSON")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options)))
        return
    sys.exit(sweep(options))


# -- one point -------------------------------------------------------------------------------------------------


class Clock(L.Callback):
    """Seconds of each step, including the device's work."""

    def __init__(self, device: str, warm_up: int) -> None:
        self.device, self.warm_up = device, warm_up
        self.seconds: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the clock once the device has finished its work."""
        if batch_idx == self.warm_up and self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._wait()
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Reads the clock."""
        self._wait()
        self.seconds.append(time.perf_counter() - self._began)
        self.norms.append(float(outputs["grad_norm"]))

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the steps of one setting."""
    point, shape = settings_of(options.point, options.small), shape_of(options.small)
    fused = True if options.device == "cuda" else None
    module = PolicyModule(
        path=options.folder,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=fused),
        micro_batch_tokens=point["tokens"],
        gradient_checkpointing=point["recompute"],
        compile_layers=point.get("compile", False),
        **options.model,
    )
    steps = point["warm_up"] + point["steps"]
    batches = [minibatch(point["tokens"], point["rows"], shape["vocab_size"], step) for step in range(steps)]
    clock = Clock(options.device, point["warm_up"])
    trainer = L.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, num_workers=0))  # type: ignore[arg-type]
    seconds = clock.seconds[point["warm_up"] :]
    per_step = point["tokens"] * point["rows"]
    speed = per_step / statistics.median(seconds)
    peak, flops = card_peak(options.device), flops_per_token(shape, point["tokens"])
    return {
        "tokens_per_second": speed,
        "tokens_per_second_range": [per_step / max(seconds), per_step / min(seconds)],
        "mfu": flops * speed / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if options.device == "cuda" else None,
        "step_seconds": seconds,
        "warm_up_seconds": clock.seconds[: point["warm_up"]],
        "gradient_norms": clock.norms,
        "tokens_per_step": per_step,
        "flops_per_token": flops,
        "card_peak_flops": peak,
    }


def minibatch(tokens: int, rows: int, vocabulary: int, seed: int) -> Minibatch:
    """Makes one response each to random prompts, with advantages of 1 and -1 in turn."""
    draw = torch.Generator().manual_seed(seed)
    prompt = min(PROMPT, tokens // 4)
    groups = []
    for place in range(rows):
        ids = torch.randint(vocabulary, (tokens,), generator=draw)
        response = Response(
            ids[prompt:], torch.full((tokens - prompt,), -11.0), "stop", parts={"score": 1.0, "acc": 1.0}
        )
        advantages = torch.tensor([1.0 if place % 2 == 0 else -1.0])
        problem = Problem(f"random {place}", "random", None)
        groups.append(Group(place, problem, ids[:prompt], [response], version=0, advantages=advantages))
    return Minibatch(groups, version=0, index=0)


def flops_per_token(shape: dict[str, Any], tokens: int) -> int:
    """FLOPs of a token as in prime-rl, see above."""
    hidden, width = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (2 * width + 2 * keys + 3 * shape["intermediate_size"])
    matrices = shape["num_hidden_layers"] * layer + shape["vocab_size"] * hidden
    return 6 * matrices + 12 * shape["num_hidden_layers"] * hidden * tokens


def card_peak(device: str) -> float | None:
    """Dense bf16 FLOPs per second of the data sheet, or None for a card that is not listed."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for card, peak in PEAKS.items() if all(word in name for word in card.split())), None)


# -- all points ------------------------------------------------------------------------------------------------


def sweep(options: argparse.Namespace) -> int:
    """Measures every point in a process of its own, and writes after each. Returns the number of failures."""
    began, failed = time.perf_counter(), 0
    found: dict[str, Any] = {
        "machine": machine("transformers", "lightning", "triton"),
        "device": options.device,
        "shape": shape_of(options.small),
        "model": options.model,
        "precision": "bf16-mixed, float32 weights",
        "published": {"what": "prime-rl at 559b447 on one H100", **PUBLISHED},
        "points": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), options)
        for name in options.points:
            point = {"point": name, **settings_of(name, options.small)}
            left = options.seconds - (time.perf_counter() - began)
            point |= in_a_process(options, name, folder, left) if left > 0 else {"left_out": "no time left"}
            failed += "failure" in point
            print(json.dumps(point), flush=True)
            found["points"].append(point)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=2) + "\n")
    return int(failed > 0)


def in_a_process(options: argparse.Namespace, name: str, folder: str, left: float) -> dict[str, Any]:
    """Measures one point; a failure is reported by its last lines. It may take a minute more than is left."""
    command = [sys.executable, __file__, "--point", name, "--folder", folder, "--device", options.device]
    command += ["--model", json.dumps(options.model), *(["--small"] if options.small else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left + 60)
    except subprocess.TimeoutExpired:
        return {"left_out": f"not done within {left + 60:.0f} s"}
    if done.returncode:
        return {"failure": done.stderr[-1500:]}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def save_random_model(folder: Path, options: argparse.Namespace) -> None:
    """Builds Qwen3 with weights as transformers initializes them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen3ForCausalLM(Qwen3Config(**shape_of(options.small))).float()
    model.cpu().save_pretrained(folder)


def shape_of(small: bool) -> dict[str, Any]:
    """Shape of the model."""
    return TINY if small else SHAPE


def settings_of(name: str, small: bool) -> dict[str, Any]:
    """Settings of a point; small ones have sequences shorter by a factor of 64."""
    point = dict(POINTS[name])
    return point | {"tokens": point["tokens"] // 64} if small else point


if __name__ == "__main__":
    main()
