"""The end of scripts/demo.sh: the table, and how much one seed can show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.places import REPOSITORY


def summary(method: str, seed: int) -> dict[str, Any]:
    evaluation = {"avg_k": 4, "pass_k": 8, "greedy": 0.05, "avg_at_k": 0.1, "pass_at_k": 0.6}
    numbers = {"iteration": 0, "eval/countdown/greedy": 0.05, "eval/countdown/avg_at_4": 0.1}
    counts = {"iterations": 300, "responses": 38400, "dynamic_sampling_responses": 77000, "wall_seconds": 128.0}
    shares = {"effective_share": 0.5, "replay_share": 0.5, "seconds": {"generate": 46.0}}
    ends = {"first_evaluation": evaluation, "last_evaluation": evaluation | {"avg_at_k": 0.3}}
    return {
        "method": method,
        "task": "countdown_tiny",
        "seed": seed,
        **counts,
        **shares,
        **ends,
        "evaluations": [numbers],
    }


def report(root: Path, seeds: tuple[int, ...]) -> str:
    for method in ("popo", "grpo"):
        for seed in seeds:
            folder = root / f"{method}-seed{seed}"
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps(summary(method, seed)))
    command = [sys.executable, str(REPOSITORY / "scripts" / "demo_report.py"), str(root)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "0.100 -> 0.300" in printed and (root / "curves.png").exists()
    return " ".join(printed.split())


def test_one_seed_is_not_passed_off_as_a_comparison(tmp_path: Path) -> None:
    one, three = report(tmp_path / "one", (1,)), report(tmp_path / "three", (1, 2, 3))
    assert "One seed decides nothing between two methods" in one
    assert "another processor or number of threads" in one and "popo compare" in one
    assert "One seed" not in three
