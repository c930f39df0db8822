"""Peak memory of the log-prob pass by number of tokens: in recomputed chunks, and with all logits at once.

Usage: python scripts/bench_memory.py [--out benchmarks/memory.json] [--device cpu|cuda] [--dtype float32|bfloat16]
       [--tokens 1024 2048 ...] [--plot-only]

Each point is a process of its own, except on CUDA: (N, H) hidden states, an output head, forward and backward. "ours"
is popo_lightning.model.logprobs.token_logprobs, which also computes the entropy; "naive" takes the log_softmax of
all (N, V) logits and no entropy. The peak is counted above states and head, so it includes the gradients of
both: resident memory on a CPU, memory allocated by torch on CUDA. A naive point that would leave less than --leave-gib
of the free memory is skipped and listed as such. Points of other numbers of tokens in --out stay.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import available_bytes, machine

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "memory.json"
TOKENS = (1024, 2048, 4096, 8192, 16384)
GIB = 2**30
NAIVE_COPIES = 5.0  # arrays of logits; a safe estimate until the first naive point has been measured


def main() -> None:
    """Measures, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the plot goes beside it, as .png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--leave-gib", type=float, default=6.0, help="memory that a naive point must leave free")
    parser.add_argument("--plot-only", action="store_true", help="draw what --out holds")
    parser.add_argument("--point", choices=("ours", "naive"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options)))
        return
    if not options.plot_only:
        sweep(options)
    plot(json.loads(options.out.read_text()), options.out.with_suffix(".png"))


# -- one point -------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of one forward and backward pass, above the memory before it."""
    tokens, dtype = options.tokens[0], getattr(torch, options.dtype)
    torch.manual_seed(0)
    head = torch.nn.Linear(options.hidden, options.vocabulary, bias=False, device=options.device, dtype=dtype)
    score = ours if options.point == "ours" else naive
    warm_up = torch.randn(8, options.hidden, device=options.device, dtype=dtype, requires_grad=True)
    score(warm_up, head, torch.arange(8, device=options.device)).sum().backward()  # libraries load their own memory
    head.weight.grad = None
    hidden = torch.randn(tokens, options.hidden, device=options.device, dtype=dtype, requires_grad=True)
    targets = torch.randint(options.vocabulary, (tokens,), device=options.device)
    before = reset_peak(options.device)
    logp = score(hidden, head, targets)
    logp.sum().backward()
    used = peak(options.device) - before
    assert hidden.grad is not None
    return {
        "bytes": used,
        "logp_sum": float(logp.detach().sum()),  # the two passes compute the same
        "gradient_norm": float(hidden.grad.float().norm()),
    }


def ours(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Runs the pass of training."""
    from popo_lightning.model.logprobs import token_logprobs

    return token_logprobs(hidden, head, targets, temperature=1.0)[0]


def naive(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Computes all logits at once."""
    return head(hidden).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def reset_peak(device: str) -> int:
    """Resets the peak, and returns the memory in use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:  # then the peak is that of the whole process, which the warm-up keeps small
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(device: str) -> int:
    """Peak memory since the last reset."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    path = Path("/proc/self/status")
    found = re.search(rf"{field}:\s*(\d+) kB", path.read_text()) if path.exists() else None
    return int(found[1]) * 1024 if found else 0


# -- all points ------------------------------------------------------------------------------------------------


def sweep(options: argparse.Namespace) -> None:
    """Measures every point and writes after each, beside earlier points of other numbers of tokens."""
    settings = {name: getattr(options, name) for name in ("device", "dtype", "hidden", "vocabulary")}
    earlier = json.loads(options.out.read_text()) if options.out.exists() else {}
    same = all(earlier.get(name) == value for name, value in settings.items())
    points = [point for point in (earlier["points"] if same else []) if point["tokens"] not in options.tokens]
    for tokens in sorted(options.tokens):
        points.append({"pass": "ours", "tokens": tokens} | in_a_process(options, "ours", tokens))
        points.append({"pass": "naive", "tokens": tokens} | naive_point(options, tokens, points))
        for point in points[-2:]:
            print(json.dumps(point), flush=True)
        check_alike(points)
        points.sort(key=lambda point: point["tokens"])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine()} | settings | {"points": points}, indent=2) + "\n")


def naive_point(options: argparse.Namespace, tokens: int, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs the naive pass, or says why it is skipped. The estimate is a tenth more than the largest one so far took."""
    taken = [point for point in points if point["pass"] == "naive" and "bytes" in point]
    largest = max(taken, key=lambda point: point["tokens"], default=None)
    per_token = 1.1 * largest["bytes"] / largest["tokens"] if largest else NAIVE_COPIES * options.vocabulary * 4
    expected, free = int(per_token * tokens), free_bytes(options.device)
    if expected > free - options.leave_gib * GIB:
        reason = f"needs about {expected / GIB:.1f} GiB; {free / GIB:.1f} GiB free, {options.leave_gib:g} to leave"
        return {"skipped": reason, "expected_bytes": expected}
    return in_a_process(options, "naive", tokens)


def in_a_process(options: argparse.Namespace, which: str, tokens: int) -> dict[str, Any]:
    """Measures one point; on a CPU in a process of its own, so that nothing else has increased its memory."""
    names = ("device", "dtype", "hidden", "vocabulary")
    settings = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    if options.device == "cuda":  # its peak can be reset
        return measure(argparse.Namespace(**vars(options) | {"point": which, "tokens": [tokens]}))
    command = [sys.executable, __file__, "--point", which, "--tokens", str(tokens), *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"bench_memory: the {which} pass over {tokens} tokens failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def free_bytes(device: str) -> int:
    """Free memory of the device."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()


def check_alike(points: list[dict[str, Any]]) -> None:
    """Stops if the two passes did not compute the same, because the comparison would mean nothing."""
    for tokens in {point["tokens"] for point in points}:
        both = [point for point in points if point["tokens"] == tokens and "bytes" in point]
        for name in ("logp_sum", "gradient_norm"):
            values = [point[name] for point in both]
            if max(values) - min(values) > 1e-3 * max(map(abs, values)):
                sys.exit(f"bench_memory: {name} over {tokens} tokens differs between the passes: {values}")


def plot(result: dict[str, Any], out: Path) -> None:
    """Plots peak against tokens; points that did not fit are hollow, at their estimated size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    labels = {"ours": "in recomputed chunks (popo_lightning)", "naive": "all logits at once"}
    for color, which in (("C0", "ours"), ("C3", "naive")):
        points = [point for point in result["points"] if point["pass"] == which]
        taken = [(point["tokens"], point["bytes"] / GIB) for point in points if "bytes" in point]
        skipped = [(point["tokens"], point["expected_bytes"] / GIB) for point in points if "skipped" in point]
        axis.plot(*zip(*taken, strict=True), marker="o", color=color, label=labels[which])
        if skipped:
            label = "did not fit, expected"
            axis.plot(*zip(*taken[-1:], *skipped, strict=True), color=color, linestyle=":", linewidth=1)
            axis.plot(*zip(*skipped, strict=True), "o", color=color, markerfacecolor="white", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks([point["tokens"] for point in result["points"] if point["pass"] == "ours"])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("response tokens in one forward and backward pass")
    axis.set_ylabel("peak memory of the pass, GiB")
    axis.set_title(
        f"vocabulary {result['vocabulary']:,}, hidden {result['hidden']}, {result['dtype']}, {result['device']}"
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
