"""Folders of runs made by hand, for the tests of popo show."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popo_lightning.evaluation.files import to_json

HOSTILE = (
    '</script><img src=x onerror="window.broken=1"><!--<script>window.broken=1</script> ]]> \u2028 \ud800 &lt;b&gt;'
)


def samples(iteration: int, group: int, size: int = 4, **changes: Any) -> list[dict[str, Any]]:
    """Returns the rows of a group. Odd groups are replayed; response k of group g is right if k < g % 5."""
    return [
        {
            "iteration": iteration,
            "group": group,
            "problem": f"problem {group}",
            "prompt": f"{group}+{group}=",
            "answer": {"sum": 2 * group},
            "response": f"the sum is {place} of group {group}",
            "score": float(place < group % 5),
            "parts": {"score": float(place < group % 5), "acc": float(place < group % 5), "format": 1.0},
            "failure": None,
            "advantage": round(place - 1.5, 3),
            "age": 2 * (group % 2),
            "fresh": group % 2 == 0,
            "finish_reason": "stop" if place else "length",
            "tokens": 5 + place,
        }
        | changes
        for place in range(size)
    ]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(to_json(row) + "\n" for row in rows))


def metrics_text(iterations: int, method: str) -> str:
    draw = random.Random(method)
    names = ["step", "reward/score", "rollout/effective_share", "replay/share", "policy/entropy", "time/iteration"]
    names += ["time/train", "time/generate", "weight/replayed_p05", "weight/replayed_p50", "weight/replayed_p95"]
    names += ["weight/replayed_p99", "weight/replayed_ess", "weight/ess_age_1", "weight/share_age_0", "train/tokens"]
    names += ["total/responses", "eval/sums/greedy", "eval/sums/avg_at_4"]
    lines = [",".join(names)]
    for step in range(iterations + 1):
        numbers = [f"{draw.random():.6f}" for _ in names[1:-3]] + [str(64 * step)]
        evaluated = [f"{step / 100:.3f}"] * 2 if step % 5 == 0 else ["", ""]
        lines.append(",".join([str(step), *(numbers if step else [""] * len(numbers)), *evaluated]))
    return "\n".join(lines) + "\n"


def make_run(
    folder: Path, method: str = "popo", iterations: int = 20, rows: Sequence[dict[str, Any]] | None = None
) -> Path:
    """Makes a finished run with an evaluation by level and subject."""
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(metrics_text(iterations, method))
    if rows is None:
        rows = [row for group in range(2 * iterations) for row in samples(1 + group // 2, group)]
    write_lines(folder / "samples.jsonl", rows)
    record = {"id": "1", "task": "sums", "method": method, "seed": 1, "settings": {"model.path": '"tiny"'}}
    (folder / "run.json").write_text(
        json.dumps(record | {"command": f"popo fit --config {method}.yaml --api_key=hidden1"})
    )
    (folder / "summary.json").write_text(json.dumps({"wall_seconds": 75.0}))
    (folder / "config.yaml").write_text(
        f"model: {{path: tiny}}\nrun: {{method: {method}}}\nserver: {{api_key: hidden2}}\n"
    )
    for iteration in (0, iterations):
        write_evaluation(folder, iteration)
    return folder


def write_evaluation(folder: Path, iteration: int) -> None:
    there = folder / "evaluations" / f"iteration-{iteration:06d}"
    numbers = {"problems": 4.0, "greedy": iteration / 40, "avg_at_4": iteration / 50, "response_tokens": 7.5}
    parts = {str(level): {"problems": 2.0, "greedy": level / 4, "avg_at_4": level / 8} for level in (1, 2)}
    breakdown = {"level": parts, "subject": {"algebra": numbers, "<i>geometry</i>": numbers}}
    content = {"iteration": iteration, "benchmarks": {"sums": {"numbers": numbers, "breakdown": breakdown}}, "mean": {}}
    there.mkdir(parents=True)
    (there / "results.json").write_text(to_json(content))
    rows = [
        {"level": 1 + problem % 2, "subject": "algebra", "benchmark": "sums", "problem": f"held out {problem}"}
        | {"prompt": [{"role": "user", "content": f"What is {problem}?"}], "answer": problem, "greedy": sample == 0}
        | {"sample": sample, "response": f"it is {sample}", "score": 1.0, "acc": float(sample == problem)}
        | {
            "parts": {"score": 1.0, "acc": float(sample == problem)},
            "failure": None,
            "finish_reason": "stop",
            "tokens": 3,
        }
        for problem in range(4)
        for sample in range(5)
    ]
    write_lines(there / "sums.jsonl", rows)


def make_odd_run(folder: Path) -> Path:
    """Makes a run whose files are valid JSON with unexpected values."""
    odd = [None, True, "text", [1, [2]], {"a": {}}, 1e999, float("nan"), 10**400, -1, ["a", {"role": 5}]]
    lines = [
        json.dumps(dict.fromkeys(samples(1, 0)[0], value) | {"response": "x", "greedy": value, "level": value}) + "\n"
        for value in odd
    ]
    run = make_run(folder)
    (run / "samples.jsonl").write_text("".join(lines))
    (run / "evaluations/iteration-000020/sums.jsonl").write_text("".join(lines))
    (run / "run.json").write_text(json.dumps({"task": [1], "origin": 5, "settings": [], "command": {}}))
    (run / "summary.json").write_text('{"wall_seconds": NaN}')
    results = {"iteration": 20, "mean": 5, "benchmarks": {"a": 5, "b": {"numbers": [], "breakdown": {"c": 1}}}}
    (run / "evaluations/iteration-000020/results.json").write_text(json.dumps(results))
    return run
