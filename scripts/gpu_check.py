"""Runs all checks that need a GPU, without a network or vLLM, in less than eight minutes.

Usage: bash scripts/gpu_check.sh OUT_FOLDER [STATE_FOLDER] [--parts a b c d e f] [--seconds 480]
       [--device cuda|cpu] [--small]

  a  pytest -m gpu: GPU against CPU, packed against plain, ratio 1 at learning rate 0, resuming, seeds, FSDP2
  b  scripts/bench_trainer.py: tokens/s, MFU and peak memory of a training step, beside prime-rl's
  c  the embedded Countdown by POPO, with its curve
  d  scripts/bench_memory.py: peak memory of the log-prob pass
  f  scripts/bench_generation.py, if it exists: throughput of the transformers engine
  e  in the remaining seconds, configs/compare/gpu_claims.yaml: several runs at once, as many as finish

OUT_FOLDER gets gpu_check.json (each part's verdict, seconds and numbers), plots, and state-*.part: the policy and the
finished runs of part e. With the OUT_FOLDER of an earlier call as STATE_FOLDER, part e continues where that call
stopped; `--parts e` runs nothing else. A part that fails, or takes too long, does not stop the others; the exit code
is 1 if any failed. POPO_CHECK_DEVICE is the default of --device; POPO_COMMIT names the commit if git cannot.
--small runs everything at tiny sizes, to try it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_plots
import torch
from gpu_claims import claims
from gpu_parts import Check, countdown, generation, memory, tests, trainer
from machine import machine

# Parts in their order, with the maximum seconds of each on a GPU; e has the rest.
PARTS: dict[str, tuple[str, Callable[[Check], dict[str, Any]], float]] = {
    "a": ("tests", tests, 120.0),
    "b": ("trainer", trainer, 165.0),
    "c": ("countdown", countdown, 80.0),
    "d": ("memory", memory, 40.0),
    "f": ("generation", generation, 60.0),
    "e": ("claims", claims, float("inf")),
}
CLOSING = 10.0  # seconds kept for plots and files


def main() -> int:
    """Runs the parts, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("state", type=Path, nargs="?")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=480.0, help="of everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=os.environ.get("POPO_CHECK_DEVICE", "cuda"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: torch sees no CUDA device; --device cpu --small tries the script without one", file=sys.stderr
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        return check(options, Path(work))


def check(options: argparse.Namespace, work: Path) -> int:
    """Runs all parts, and writes the result after each."""
    began = time.monotonic()
    until = began + options.seconds - CLOSING
    found: dict[str, Any] = circumstances(options)
    for letter in sorted(options.parts, key=list(PARTS).index):
        name, make, most = PARTS[letter]
        print(f"== {letter} {name}", flush=True)
        start = time.monotonic()
        left = min(most if options.device == "cuda" else float("inf"), until - start)
        one = Check(options.device, options.small, options.out, work, options.state, start + left)
        result = make_part(make, one, left)
        found["parts"][name] = result | {"part": letter, "seconds": round(time.monotonic() - start, 1)}
        print(f"   {result['verdict']}{': ' + result['reason'] if result.get('reason') else ''}", flush=True)
        write(found, options.out, began)
    for name, error in gpu_plots.draw(found, options.out).items():
        found["parts"][name] |= {"verdict": "failed", "reason": f"no plot: {error}"}
    write(found, options.out, began)
    for name, part in found["parts"].items():
        print(
            f"{part['part']}  {name:<11}{part['verdict']:<9}{part['seconds']:>6.0f} s  {part.get('reason', '')[:150]}"
        )
    return int(any(part["verdict"] == "failed" for part in found["parts"].values()))


def make_part(make: Callable[[Check], dict[str, Any]], one: Check, left: float) -> dict[str, Any]:
    """Returns a part's result; any exception is its failure."""
    if left < 5:
        return {"verdict": "skipped", "reason": "no time was left"}
    try:
        return make(one)
    except Exception as error:  # the other parts continue in any case
        return {"verdict": "failed", "reason": f"{type(error).__name__}: {error}"}


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """Card, driver, versions, commit and settings, with a place for the parts."""
    card = None
    if options.device == "cuda":
        card = torch.cuda.get_device_name()
    return {
        "card": card,
        "card_memory_gib": torch.cuda.mem_get_info()[1] / 2**30 if card else None,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if card else None,
        "commit": said("git", "rev-parse", "HEAD") or os.environ.get("POPO_COMMIT"),
        "changed_files": said("git", "status", "--porcelain", "--untracked-files=no"),
        "machine": machine("transformers", "lightning", "triton", "vllm", "tokenizers"),
        "device": options.device,
        "small": options.small,
        "limit_seconds": options.seconds,
        "parts": {},
    }


def said(*command: str) -> str | None:
    """Output of a command, or None if the command does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(found: dict[str, Any], out: Path, began: float) -> None:
    """Writes gpu_check.json, which is complete at any time."""
    found["seconds"] = round(time.monotonic() - began, 1)
    draft = out / "gpu_check.json.draft"
    draft.write_text(json.dumps(found, indent=2) + "\n")
    draft.replace(out / "gpu_check.json")


if __name__ == "__main__":
    sys.exit(main())
