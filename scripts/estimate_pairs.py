"""Compares `popo estimate` with real evaluations on pairs of checkpoints of the embedded Countdown task.

Every evaluation has draws of its own (`evaluation.new_draws`). With the same seeds, the evaluations of two checkpoints
would share their noise, and so would all pairs.

    python scripts/estimate_pairs.py train RUN [SETTINGS ...]    # a run with 21 evaluations and 20 checkpoints
    python scripts/estimate_pairs.py compare RUN OUT.json        # its pairs, also as OUT.md
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from popo_lightning.cli.estimate.bootstrap import Estimated, mean_over_problems
from popo_lightning.cli.estimate.judgment import SAMPLED, Choices, Judgment, judged
from popo_lightning.cli.estimate.logged import LoggedBenchmark, evaluations_of, logged_benchmarks
from popo_lightning.cli.estimate.scoring import Judged
from popo_lightning.cli.export.saved_policy import saved_policy
from popo_lightning.core.markdown import markdown_table

EVERY, ITERATIONS = 10, 200
DISTANCES = (1, 2, 4, 8)  # evaluations between the responses and the checkpoint


def train(run: Path, more: Sequence[str]) -> None:
    """Makes a POPO run that keeps every checkpoint and its evaluation's tokens."""
    settings = {
        "run.folder": run,
        "trainer.max_epochs": ITERATIONS,
        "evaluation.every_n_iterations": EVERY,
        "evaluation.greedy": "false",
        "evaluation.keep_responses": 100_000,
        "evaluation.new_draws": "true",
        "checkpoint.every_n_epochs": EVERY,
        "checkpoint.save_top_k": -1,
    }
    command = [sys.executable, "-m", "popo_lightning", "fit", "--config", "task/countdown_tiny"]
    command += ["--config", "method/popo"]
    command += [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    subprocess.run([*command, *more], check=True)


def compare(run: Path, out: Path) -> None:
    """Estimates every checkpoint from the responses of each distance before it."""
    checkpoints = {
        int(found[1]): path
        for path in (run / "checkpoints").glob("*.ckpt")
        if (found := re.fullmatch(r"iteration-(\d+)\.ckpt", path.name)) and int(found[1]) % EVERY == 0
    }
    pairs: list[dict[str, Any]] = []
    for newer in sorted(checkpoints):
        policy = Judged(saved_policy(str(checkpoints[newer])))
        for distance in DISTANCES:
            older = newer - distance * EVERY
            if older >= 0:
                logged = _logged(run, older)
                judgment = judged(policy.trajectories(logged.groups, logged.temperature), Choices())
                pairs.append(_pair(older, newer, judgment, _real(run, older), _real(run, newer)))
                print(older, newer, pairs[-1]["effective"], pairs[-1]["refused"], flush=True)
    write(pairs, out)


def write(pairs: Sequence[dict[str, Any]], out: Path) -> None:
    """Writes the numbers and a table."""
    out.write_text(json.dumps({"pairs": pairs, "summary": _summary(pairs)}, indent=1) + "\n")
    out.with_suffix(".md").write_text(_table(_summary(pairs)))


@cache
def _logged(run: Path, iteration: int) -> LoggedBenchmark:
    (logged,) = logged_benchmarks(evaluations_of(str(run), [iteration], None))
    return logged


def _real(run: Path, iteration: int) -> dict[str, float]:
    """Accuracy of each problem in an evaluation."""
    return {group.problem.id: float(group.rewards("acc").mean()) for group in _logged(run, iteration).groups}


def _pair(older: int, newer: int, found: Judgment, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    values = np.array(list(after.values()))
    return {
        "older": older,
        "newer": newer,
        "problems": found.problems,
        "effective": float(found.effective.mean()),
        "share_unusable": found.share_unusable,
        "mean_weight": found.mean_weight,
        "refused": found.refused,
        "real": asdict(mean_over_problems(values)),
        "real_change": float(values.mean() - np.mean([before[name] for name in after])),
        "estimates": {
            name: asdict(value) for name, value in ({SAMPLED: found.sampled} | dict(found.estimates)).items()
        },
        "changes": {name: asdict(value) for name, value in found.changes.items()},
    }


def _summary(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By distance and estimator: how often intervals contain the real value, and the errors of the estimates."""
    kinds: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for pair in pairs:
        for name in pair["estimates"]:
            if not pair["refused"]:
                kinds[pair["newer"] - pair["older"], name].append(pair)
    found = []
    for (distance, name), them in sorted(kinds.items(), key=lambda kind: kind[0][0]):
        of_distance = [pair for pair in pairs if pair["newer"] - pair["older"] == distance]
        errors = [pair["estimates"][name]["value"] - pair["real"]["value"] for pair in them]
        changes = [pair["changes"].get(name, {"value": 0.0})["value"] - pair["real_change"] for pair in them]
        found.append(
            {
                "distance": distance,
                "pairs": len(of_distance),
                "refused": sum(pair["refused"] for pair in of_distance),
                "effective": float(np.mean([pair["effective"] for pair in of_distance])),
                "estimator": name,
                "real_in_its_interval": sum(_within(p["real"]["value"], p["estimates"][name]) for p in them),
                "in_the_real_interval": sum(_within(p["estimates"][name]["value"], p["real"]) for p in them),
                "change_in_its_interval": sum(_within(p["real_change"], p["changes"][name]) for p in them)
                if name != SAMPLED
                else None,
                "rms_error": float(np.sqrt(np.mean(np.square(errors)))),
                "mean_error": float(np.mean(errors)),
                "rms_change_error": float(np.sqrt(np.mean(np.square(changes)))),
            }
        )
    return found


def _within(value: float, interval: dict[str, float]) -> bool:
    found = Estimated(**interval)
    return found.low <= value <= found.high


def _table(summary: Sequence[dict[str, Any]]) -> str:
    header = [
        "iterations apart",
        "pairs",
        "refused",
        "effective of 8",
        "estimator",
        "rms error",
        "mean error",
        "rms error of the change",
    ]
    header += ["real value in the estimate's interval", "estimate in the real interval", "real change in its interval"]
    rows = []
    for each in summary:
        numbers = [
            f"{each['effective']:.2f}",
            each["estimator"],
            f"{each['rms_error']:.4f}",
            f"{each['mean_error']:+.4f}",
            f"{each['rms_change_error']:.4f}",
        ]
        counts = [each["real_in_its_interval"], each["in_the_real_interval"], each["change_in_its_interval"]]
        rows.append(
            [str(each[name]) for name in ("distance", "pairs", "refused")]
            + numbers
            + ["" if count is None else str(count) for count in counts]
        )
    return markdown_table(header, rows) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "compare"))
    parser.add_argument("run", type=Path)
    options, rest = parser.parse_known_args()
    if options.step == "train":
        train(options.run, rest)
    elif len(rest) == 1:
        compare(options.run, Path(rest[0]))
    else:
        parser.error("compare takes RUN and OUT.json")
