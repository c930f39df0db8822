"""Parts a to d and f of scripts/gpu_check.py: each runs a command and returns its verdict and numbers."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINE = "popo_lightning.engines.transformers.TransformersEngine"
MIN_GAIN = 0.03  # minimum gain of avg@4 in part c; on a CPU it is about 0.1
PATIENCE = 35.0  # seconds that a command has for stopping; popo compare gives its runs 30


@dataclass(frozen=True)
class Check:
    """Settings of a part.

    Args:
        device: cuda or cpu.
        small: Whether to use tiny sizes.
        out: Folder of the results.
        work: Folder for everything else, removed afterwards.
        state: Folder of an earlier call's results, or None.
        until: Time by which the part must be done, on the clock of time.monotonic.
    """

    device: str
    small: bool
    out: Path
    work: Path
    state: Path | None
    until: float

    @property
    def left(self) -> float:
        """Remaining seconds."""
        return self.until - time.monotonic()

    @property
    def accelerator(self) -> list[str]:
        """Settings of popo that run it on the device."""
        return ["--trainer.accelerator", "gpu" if self.device == "cuda" else "cpu", "--trainer.devices", "1"]

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the commands: policies go to the work folder, and threads leave cores to the other runs."""
        own = {"POPO_CACHE": str(self.work / "cache"), "POPO_TEST_DEVICE": self.device}
        return {"OMP_NUM_THREADS": "1"} | os.environ | own | {"PYTHONUNBUFFERED": "1"}  # errors come last


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Args:
        code: Exit code; None if it was stopped when its time was up.
        output: The end of its output.
    """

    code: int | None
    output: str

    @property
    def failure(self) -> dict[str, Any] | None:
        """A failed verdict, or None."""
        if self.code == 0:
            return None
        how = "stopped at its time" if self.code is None else f"exit code {self.code}"
        return {"verdict": "failed", "reason": f"{how}: {last_line(self.output)}", "output": self.output}


def run(check: Check, *command: str | Path, seconds: float | None = None) -> Done:
    """Runs a command of this interpreter. When the part's time is up it is asked to stop, then killed."""
    limit = max(1.0, check.left if seconds is None else min(seconds, check.left))
    log = check.work / f"log-{time.monotonic_ns()}.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=REPOSITORY,
            env=check.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        code: int | None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            stop(process)
            code = None
    return Done(code, log.read_bytes()[-4000:].decode(errors="replace"))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stops a process and its group; popo compare stops its own runs, which have groups of their own."""
    for request in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, request)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                continue


def last_line(text: str) -> str:
    """Last line of an output that is not empty."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "no output")


# -- the parts -------------------------------------------------------------------------------------------------


def tests(check: Check) -> dict[str, Any]:
    """Part a: passes only if some test ran and none failed."""
    report = check.work / "tests.xml"
    only = ["tests/gpu/test_correctness.py", "-k", "qwen2 or context"] if check.small else ["tests/gpu"]
    command = ["-m", "pytest", *only, "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = run(check, *command)
    if not report.exists():
        return done.failure or {"verdict": "failed", "reason": "pytest wrote no report", "output": done.output}
    cases = list(ElementTree.parse(report).iter("testcase"))
    states = {f"{case.get('classname')}::{case.get('name')}": state(case) for case in cases}
    numbers = {kind: sum(found == kind for found in states.values()) for kind in ("passed", "failed", "skipped")}
    result = {"numbers": numbers, "tests": states}
    if done.failure or numbers["failed"] or not numbers["passed"]:
        failed = ", ".join(name for name, found in states.items() if found == "failed")
        reason = f"failed: {failed}" if failed else "no test ran"
        return (done.failure or {}) | {"verdict": "failed", "reason": reason, "output": done.output} | result
    return {"verdict": "passed", "reason": ", ".join(f"{n} {kind}" for kind, n in numbers.items())} | result


def state(case: Any) -> str:
    """Outcome of a test in pytest's report."""
    found = {child.tag for child in case}
    return "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"


def trainer(check: Check) -> dict[str, Any]:
    """Part b: passes if 16k and 64k were measured. Its numbers say whether they are above the published figures."""
    out = check.work / "trainer.json"
    small = ["--small", "--points", "16k", "64k"] if check.small else []
    seconds = max(1.0, check.left - 60)
    done = run(
        check, "scripts/bench_trainer.py", "--device", check.device, "--out", out, "--seconds", f"{seconds}", *small
    )
    if not out.exists():
        return done.failure or {"verdict": "failed", "reason": "nothing was written", "output": done.output}
    numbers = json.loads(out.read_text())
    measured = {point["point"]: point for point in numbers["points"] if "tokens_per_second" in point}
    failures = [f"{point['point']}: {last_line(point['failure'])}" for point in numbers["points"] if "failure" in point]
    missing = [name for name in ("16k", "64k") if name not in measured]
    ahead = {name: ahead_of(numbers["published"][name], measured, name) for name in ("16k", "64k")}
    if failures or missing:
        reason = "; ".join(failures) or f"not measured: {', '.join(missing)}"
        return {"verdict": "failed", "reason": reason, "numbers": numbers, "ahead_of_published": ahead}
    said = ", ".join(f"{name} {measured[name]['tokens_per_second']:,.0f} tokens/s" for name in ("16k", "64k"))
    behind = [] if check.small else [name for name, one in ahead.items() if not all(one.values())]
    aim = f"; BEHIND the published figures at {', '.join(behind)}" if behind else ""
    return {"verdict": "passed", "reason": said + aim, "numbers": numbers, "ahead_of_published": ahead}


def ahead_of(published: dict[str, float], measured: dict[str, Any], name: str) -> dict[str, bool]:
    """For each number, whether the best setting of a length with recomputation is ahead."""
    points = [point for label, point in measured.items() if label.split()[0] == name and point["recompute"]]
    if not points:
        return {}
    best = max(points, key=lambda point: point["tokens_per_second"])
    found = {"tokens_per_second": best["tokens_per_second"] > published["tokens_per_second"]}
    if best["mfu"] is not None:
        found["mfu"] = best["mfu"] > published["mfu"]
    if best["peak_gib"] is not None:
        found["peak_gib"] = best["peak_gib"] < published["peak_gib"]
    return found


def countdown(check: Check) -> dict[str, Any]:
    """Part c: passes if held-out avg@4 rose by MIN_GAIN."""
    folder = check.work / "countdown"
    iterations = 4 if check.small else 160
    settings = ["--data.engine", ENGINE, "--model.warm_start.device", check.device]
    settings += ["--model.optimizer.init_args.lr", "1.0e-4", "--trainer.max_epochs", str(iterations)]
    settings += ["--evaluation.every_n_iterations", str(iterations // 4), "--evaluation.samples", "4"]
    settings += ["--evaluation.pass_k", "4", "--checkpoint.every_n_epochs", "1000"]
    if check.small:
        settings += ["--model.warm_start.examples", "2560", "--evaluation.limit", "20"]
        settings += ["--data.problems_per_iteration", "8", "--model.warm_start.learning_rate", "6.0e-3"]
    files = ["--config", "configs/task/countdown_tiny.yaml", "--config", "configs/method/popo.yaml"]
    done = run(check, "-m", "popo_lightning", "fit", *files, *settings, *check.accelerator, "--run.folder", folder)
    if done.failure:
        return done.failure
    summary = json.loads((folder / "summary.json").read_text())
    first, last = (summary[name]["avg_at_k"] for name in ("first_evaluation", "last_evaluation"))
    numbers = {
        name: summary[name] for name in ("iterations", "responses", "wall_seconds", "seconds", "effective_share")
    }
    numbers |= {"evaluations": summary["evaluations"], "first_avg_at_4": first, "last_avg_at_4": last}
    result = {"numbers": numbers, "curve": curve(folder / "metrics.csv")}
    said = f"avg@4 {first:.3f} -> {last:.3f} in {summary['wall_seconds']:.0f} s"
    if last - first < MIN_GAIN and not check.small:
        return {"verdict": "failed", "reason": f"{said}; at least {MIN_GAIN} more was expected"} | result
    return {"verdict": "passed", "reason": said} | result


def curve(path: Path) -> dict[str, list[float]]:
    """Mean reward and effective share by iteration."""
    names = ("reward/score", "rollout/effective_share", "time/iteration", "engine/logp_gap_mean")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("time/iteration")]
    return {name: [float(row[name]) if row.get(name) else float("nan") for row in rows] for name in ("step", *names)}


def memory(check: Check) -> dict[str, Any]:
    """Part d: passes if every pass in chunks was measured; one with all logits may not fit."""
    out = check.work / "memory.json"
    sizes = ["--tokens", *map(str, (1024, 2048, 4096, 8192, 16384, 32768, 65536))]
    settings = ["--hidden", "1024", "--dtype", "bfloat16", *sizes]
    if check.small:
        settings = ["--hidden", "64", "--vocabulary", "8192", "--dtype", "float32", "--tokens", "1024", "2048"]
    done = run(check, "scripts/bench_memory.py", "--device", check.device, "--out", out, *settings)
    if done.failure:
        return done.failure
    numbers = json.loads(out.read_text())
    most = max((p for p in numbers["points"] if p["pass"] == "ours"), key=lambda point: point["tokens"])
    said = f"{most['bytes'] / 2**30:.2f} GiB at {most['tokens'] // 1024}k tokens"
    return {"verdict": "passed", "reason": said, "numbers": numbers}


def generation(check: Check) -> dict[str, Any]:
    """Part f: passes if the tiny case was measured and none failed; names large cases that did not finish in time."""
    script = REPOSITORY / "scripts" / "bench_generation.py"
    if not script.exists():
        return {"verdict": "skipped", "reason": "there is no scripts/bench_generation.py"}
    numbers: dict[str, Any] = {}
    said, failure = [], None
    for case in ("countdown",) if check.small or check.device == "cpu" else ("countdown", "qwen3-0.6b"):
        out = check.work / f"generation-{case}.json"
        done = run(check, script, "--device", check.device, "--case", case, "--repeats", "1", "--out", out)
        if out.exists():
            numbers[case] = json.loads(out.read_text())
            continue
        said.append(f"{case} was not done in time" if done.code is None else f"{case}: {last_line(done.output)}")
        failure = done.failure if done.code is not None or case == "countdown" else failure
    reason = "; ".join(said)
    if failure is not None:
        return failure | {"reason": reason, "numbers": numbers}
    return {"verdict": "passed", "reason": reason, "numbers": numbers}
