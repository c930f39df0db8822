"""Part e of scripts/gpu_check.py: compares methods on a policy of about 10M parameters, over several calls."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from gpu_parts import Check, last_line, run

SHARE = (0.2, 0.4)  # range of the policy's effective share; the paper's tasks have 0.25 to 0.35
PART_BYTES = 15 * 2**20  # maximum size of a file of the state
MAX_PARTS = 3
MIN_SECONDS = 60.0  # with less time no run is started
CLOSING = 40.0  # seconds kept for the report and the state
# Files of a finished run: small, and enough for the report. No checkpoints.
KEPT = ("compare.json", "summary.json", "metrics.csv", "log.txt", "evaluations")
TINY_TASK: dict[str, Any] = {"numbers": [2, 3], "largest_number": 6, "held_out_problems": 20}
TINY: dict[str, Any] = {
    "numbers": TINY_TASK["numbers"],
    "largest_number": TINY_TASK["largest_number"],
    "hidden_size": 64,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 128,
    "right": 0.45,
    "examples": 9000,
    "batch_size": 60,
    "learning_rate": 6e-3,
    "device": "cpu",
}
CONFIG = "configs/task/countdown_10m.yaml"


def claims(check: Check) -> dict[str, Any]:
    """Builds the policy, measures its effective share, then makes runs. Fails if the share or a run fails."""
    taken = take_state(check)
    share = check.work / "share.json"
    changed = ["--warm_start", json.dumps(tiny(check)), "--task", json.dumps(TINY_TASK)] if check.small else []
    sizes = ["--problems", "48" if check.small else "256"]
    done = run(
        check,
        "scripts/effective_share.py",
        "--config",
        CONFIG,
        "--device",
        check.device,
        "--out",
        share,
        *sizes,
        *changed,
    )
    if done.failure:
        return done.failure
    numbers: dict[str, Any] = {"policy": json.loads(share.read_text()), "runs_taken_over": taken}
    effective = numbers["policy"]["effective_share"]
    if not check.small and not SHARE[0] <= effective <= SHARE[1]:
        return {
            "verdict": "failed",
            "reason": f"stopped before any run: the policy's effective share is {effective:.3f}, not {SHARE[0]} to "
            f"{SHARE[1]}; change model.warm_start.right or .examples in {CONFIG} "
            f"({'lower' if effective > SHARE[1] else 'raise'} it)",
            "numbers": numbers,
        }
    if check.left < MIN_SECONDS + CLOSING:
        keep_state(check)
        reason = f"no time for a run; effective share {effective:.3f}; the policy is kept in the state"
        return {"verdict": "skipped", "reason": reason, "numbers": numbers}
    compare = [
        "-m",
        "popo_lightning",
        "compare",
        "--config",
        "configs/compare/gpu_claims.yaml",
        "--root",
        str(root(check)),
    ]
    compare += tiny_comparison(check) if check.small else []
    made = run(check, *compare, seconds=check.left - CLOSING)
    reported = run(check, *compare, "--report_only", "true")
    numbers |= summaries(check) | {"kept_in_state": keep_state(check), "report": report(check)}
    finished = numbers["finished"]
    said = f"effective share {effective:.3f}; {len(finished)} runs finished, {len(finished) - taken} of them now"
    if made.code not in (0, None) or reported.code != 0 or (made.code is None and len(finished) == taken):
        why = last_line((made if made.code not in (0, None) else reported).output)
        return {"verdict": "failed", "reason": f"{said}: {why}", "numbers": numbers, "output": made.output}
    return {"verdict": "passed", "reason": said, "numbers": numbers}


def root(check: Check) -> Path:
    """Folder of the comparison."""
    return check.work / "claims"


def tiny(check: Check) -> dict[str, Any]:
    """Settings of a warm start that takes seconds."""
    return TINY | {"device": check.device}


def tiny_comparison(check: Check) -> list[str]:
    """Arguments of a comparison of two methods with one seed and three iterations."""
    settings: dict[str, Any] = {f"model.warm_start.{name}": value for name, value in tiny(check).items()}
    settings |= {f"data.task.{name}": value for name, value in TINY_TASK.items()}
    settings |= {
        "data.problems_per_iteration": 8,
        "trainer.max_epochs": 3,
        "trainer.accelerator": "gpu" if check.device == "cuda" else "cpu",
        "evaluation.every_n_iterations": 1,
    }
    methods = {name: {"config": [f"configs/method/{name}.yaml"]} for name in ("grpo", "popo")}
    words = ["--arguments", json.dumps(settings), "--methods", json.dumps(methods), "--dynamic_sampling", "null"]
    return [*words, "--seeds", "[1]", "--at_once", "2"]


def summaries(check: Check) -> dict[str, Any]:
    """Numbers of every finished run that tables need, and the comparison's own tables."""
    finished = []
    for path in sorted(root(check).glob("runs/*/summary.json")):
        summary = json.loads(path.read_text())
        names = ("method", "seed", "iterations", "responses", "wall_seconds", "effective_share", "replay_share")
        finished.append(
            {name: summary[name] for name in (*names, "first_evaluation", "last_evaluation", "evaluations")}
        )
    return {"finished": finished, "table": table(root(check) / "runs.csv")}


def table(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a CSV file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def report(check: Check) -> str:
    """Text of the comparison's report.md, or nothing without one."""
    path = root(check) / "report.md"
    return path.read_text() if path.exists() else ""


# -- state -----------------------------------------------------------------------------------------------------


def keep_state(check: Check) -> list[str]:
    """Packs policy, finished runs and report into files of at most PART_BYTES; returns their names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for folder in sorted((check.work / "cache").glob("countdown-llama-*")):
            if folder.is_dir() and not folder.name.endswith(".draft") and is_of_claims(folder):
                archive.add(folder, f"cache/{folder.name}")
        for summary in sorted(root(check).glob("runs/*/summary.json")):
            for name in KEPT:
                if (path := summary.parent / name).exists():
                    archive.add(path, f"claims/runs/{summary.parent.name}/{name}")
        for path in sorted(root(check).glob("*.*")):
            archive.add(path, f"claims/{path.name}")
    whole = buffer.getvalue()
    if len(whole) > MAX_PARTS * PART_BYTES:
        raise ValueError(f"the state has {len(whole):,} bytes, more than {MAX_PARTS} files of {PART_BYTES:,}")
    for old in check.out.glob("state-*.part"):
        old.unlink()
    names = []
    for place, start in enumerate(range(0, len(whole), PART_BYTES)):
        names.append(f"state-{place}.part")
        (check.out / names[-1]).write_bytes(whole[start : start + PART_BYTES])
    return names


def is_of_claims(folder: Path) -> bool:
    """Whether a built policy is this part's, not that of part c, which has three layers."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return int(config["num_hidden_layers"]) != 3


def take_state(check: Check) -> int:
    """Unpacks an earlier call's state; returns its number of finished runs."""
    parts = sorted(check.state.glob("state-*.part")) if check.state is not None else []
    if not parts:
        return 0
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts)), mode="r:gz") as archive:
        archive.extractall(check.work, filter="data")
    for path in root(check).glob("*.*"):  # the report is written again
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return len(list(root(check).glob("runs/*/summary.json")))
