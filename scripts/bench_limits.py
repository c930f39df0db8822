"""Measures whether a limit is met, and whether it is more accurate than the best fixed penalty that meets it.

Usage: python scripts/bench_limits.py [--folder FOLDER] [--iterations 120] [--seeds 1 2 3 4 5] [--out FILE.json]

Trains GRPO on Countdown with two numbers, whose correct answers have six to nine tokens with the end token, and a
policy of 0.1M parameters that is trained on first use. The bound is 80% of GRPO's mean length over the last third of
its runs. Then come runs under `data.limits.length`, with two values of c, and runs with a fixed penalty on the same
cost (lr 0, c 0), in units of the bound: all penalties on the first two seeds, and the smallest that meets the bound
there on all seeds. All runs are in this process, one after the other. Runs that FOLDER already has are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from machine import machine

from popo_lightning.cli.main import run

REPOSITORY = Path(__file__).resolve().parent.parent
SHARE, TOLERANCE = 0.8, 1.02
PENALTIES = (0.5, 0.75, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.5, 2.0)
C = (10.0, 1.0)  # the default first
NUMBERS = {"numbers": 2, "largest_number": 12, "operations": "+-*", "held_out_share": 0.3}
TASK = NUMBERS | {"held_out_problems": 60, "orders": 2, "min_ways": 1}
POLICY = {"examples": 12000, "batch_size": 60, "learning_rate": 6e-3, "right": 0.45}
SIZES = {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128}
SETTINGS: dict[str, Any] = {
    "model.warm_start": {"class_path": "CountdownWarmStart", "init_args": NUMBERS | POLICY | SIZES},
    "model.optimizer.init_args.lr": 5e-4,
    "data.task": {"class_path": "CountdownSteps", "init_args": TASK},
    "data.engine": "TransformersEngine",
    "data.max_new_tokens": 12,
    "data.max_prompt_tokens": 16,
    "data.minibatches": 1,
    "evaluation.every_n_iterations": 0,
    "evaluation.at_start": "false",
    "evaluation.samples": 8,
    "evaluation.avg_k": 8,
    "evaluation.pass_k": 8,
}


def main() -> None:
    """Runs all and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/limits"), help="of the runs")
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "limits.json")
    options = parser.parse_args()

    def arm(name: str, seeds: list[int], limit: dict[str, float] | None) -> list[dict[str, float]]:
        return [last_third(fitted(options.folder / f"{name}-seed{s}", s, options.iterations, limit)) for s in seeds]

    free = arm("grpo", options.seeds, None)
    bound = round(SHARE * statistics.mean(each["tokens"] for each in free), 2)
    arms = {"grpo": free}
    arms |= {f"limit c {c:g}": arm(f"limit-c{c:g}", options.seeds, {"bound": bound, "c": c}) for c in C}
    few = options.seeds[:2]
    arms |= {f"fixed {each:g}": arm(f"fixed{each:g}", few, fixed(bound, each)) for each in PENALTIES}
    kept = [each for each in PENALTIES if all(run["tokens"] <= TOLERANCE * bound for run in arms[f"fixed {each:g}"])]
    if kept:
        arms[f"fixed {kept[0]:g}"] = arm(f"fixed{kept[0]:g}", options.seeds, fixed(bound, kept[0]))
    settings = {"share": SHARE, "seeds": options.seeds, "iterations": options.iterations, "bound": bound}
    options.out.write_text(json.dumps({"machine": machine(), **settings, "arms": arms}, indent=1) + "\n")
    for name, runs in arms.items():
        for key in runs[0]:
            print(f"{name:10} {key:14}", " ".join(f"{each[key]:8.3f}" for each in runs))


def fixed(bound: float, penalty: float) -> dict[str, float]:
    """Settings of a limit whose multiplier does not learn."""
    return {"bound": bound, "lr": 0.0, "c": 0.0, "start": penalty}


def fitted(folder: Path, seed: int, iterations: int, limit: dict[str, float] | None) -> Path:
    """Makes a run, unless it exists, and returns its folder."""
    if not (folder / "summary.json").exists():
        settings = SETTINGS | {"trainer.max_epochs": iterations, "seed_everything": seed}
        settings |= {"run.folder": str(folder), "run.resume": "true"}
        settings |= {} if limit is None else {"data.limits": {"length": limit}}
        words = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in settings.items()]
        run(["fit", "--config", "task/countdown_tiny", "--config", "method/grpo", *words])
    return folder


def last_third(folder: Path) -> dict[str, float]:
    """Means over the last third of a run, and its last evaluation."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("rollout/response_tokens")]
    rows = rows[-(len(rows) // 3) :]
    found = {"tokens": "rollout/response_tokens", "accuracy": "reward/acc", "multiplier": "limits/length/multiplier"}
    means = {name: statistics.mean(float(row.get(key) or 0) for row in rows) for name, key in found.items()}
    evaluation = json.loads((folder / "summary.json").read_text())["last_evaluation"]
    return means | {"held_out_avg_at_8": evaluation["avg_at_k"]}


if __name__ == "__main__":
    main()
