"""Seconds of the group buffer's operations by number of stored groups, and bytes of a stored group.

Usage: python scripts/bench_buffer.py [--out benchmarks/buffer.json] [--sizes 1000 10000 100000 1000000] [--plot-only]

A full buffer without an age limit has the effective groups of several iterations, with --sampled groups per iteration,
half of them effective. The script times POPO's operations of an iteration: "select" finds a group for each ineffective
one (newest first, no problem twice), and "insert" adds the effective ones and removes as many of the oldest. "all"
lists every stored group, as rules that rank the whole buffer do. Each time is the median of repetitions.

Groups are separate objects but share the tensors of one response each; otherwise a million would not fit into memory.
The operations never read tensors, so their cost does not depend on them. The bytes of a stored group are measured on
--distinct groups that share nothing.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from machine import machine

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.replay.buffer import GroupReplayBuffer

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "buffer.json"
OPERATIONS = {"select": "select, newest first", "insert": "insert", "all": "list all"}


def main() -> None:
    """Measures, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the plot goes beside it, as .png")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="stored groups")
    parser.add_argument("--sampled", type=int, default=256, help="groups an iteration samples")
    parser.add_argument("--problems", type=int, default=10_000, help="different problems")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a response, for the bytes")
    parser.add_argument("--distinct", type=int, default=2000, help="groups that the bytes are measured on")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--plot-only", action="store_true", help="draw what --out holds")
    options = parser.parse_args()
    if not options.plot_only:
        result = {
            "machine": machine(),
            "sampled_groups": options.sampled,
            "inserted_groups": options.sampled // 2,
            "problems": options.problems,
            "bytes": group_bytes(options),  # first, because leftovers of the operations would distort it
            "seconds": [seconds(size, options) for size in sorted(options.sizes)],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    plot(json.loads(options.out.read_text()), options.out.with_suffix(".png"))


# -- seconds ---------------------------------------------------------------------------------------------------


def seconds(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each operation in a buffer of this size."""
    random = Random(size)
    shared = responses(options.group_size, 4)
    inserted = options.sampled // 2

    def effective(version: int) -> list[Group]:
        asked = [problem(random.randrange(options.problems)) for _ in range(inserted)]
        return [Group(0, each, shared[0].token_ids, shared, version) for each in asked]

    buffer = GroupReplayBuffer(size, max_age=None)
    version = 0
    while len(buffer) < size:
        buffer.insert(effective(version), options.sampled)
        version += 1
    coming = [effective(version + repeat) for repeat in range(options.repeats)]
    gc.collect()
    gc.disable()  # a garbage collection in between would visit every group
    found: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    for groups in coming:
        present = groups[0].version
        asked = {group.problem.id for group in groups}
        missing = options.sampled - inserted
        found["select"].append(timed(lambda: buffer.newest(missing, present, exclude_problems=asked)))  # noqa: B023
        found["insert"].append(timed(lambda: buffer.insert(groups, options.sampled)))  # noqa: B023
    for _ in range(min(5, options.repeats)):
        found["all"].append(timed(lambda: buffer.usable(version + options.repeats)))
    gc.enable()
    result = {"groups": size} | {name: statistics.median(taken) for name, taken in found.items()}
    print(json.dumps(result), flush=True)
    return result


def timed(operation: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    operation()
    return time.perf_counter() - began


# -- bytes -----------------------------------------------------------------------------------------------------


def group_bytes(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of groups that share nothing: in memory, in tensors alone, and in a checkpoint."""
    buffer = GroupReplayBuffer(options.distinct, max_age=None)
    gc.collect()
    before = resident()
    for number in range(options.distinct):
        made = responses(options.group_size, options.tokens)
        prompt = torch.randint(2**15, (options.tokens // 4,))
        buffer.insert([Group(number, problem(number), prompt, made, number)], 1)
    in_memory = (resident() - before) / options.distinct
    stored = buffer.usable(options.distinct)
    tensors = [group.prompt_ids for group in stored]
    tensors += [t for g in stored for response in g.responses for t in (response.token_ids, response.behave_logp)]
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    return {
        "distinct_groups": options.distinct,
        "group_size": options.group_size,
        "response_tokens": options.tokens,
        "prompt_tokens": options.tokens // 4,
        "resident": round(in_memory),
        "tensors": round(sum(t.nbytes for t in tensors) / options.distinct),
        "checkpoint": round(file.getbuffer().nbytes / options.distinct),
    }


def resident() -> int:
    """Bytes of this process in main memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def responses(count: int, tokens: int) -> list[Response]:
    """Responses of a group, with tensors of their own and text of four characters per token."""
    parts = [{"score": float(place % 2), "acc": float(place % 2), "format": 1.0} for place in range(count)]
    return [
        Response(
            torch.randint(2**15, (tokens,)), torch.rand(tokens).log(), "stop", f"{place:04d}" * tokens, parts[place]
        )
        for place in range(count)
    ]


def problem(number: int) -> Problem:
    """A problem."""
    return Problem(f"problem {number}", f"question {number}:", {"numbers": [1, 2], "target": 3}, {"level": 2})


def plot(result: dict[str, Any], out: Path) -> None:
    """Plots seconds against groups, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    sizes = [row["groups"] for row in result["seconds"]]
    for name, label in OPERATIONS.items():
        axis.loglog(sizes, [row[name] for row in result["seconds"]], marker="o", label=label)
    axis.set_xlabel("stored groups")
    axis.set_ylabel("seconds an iteration")
    axis.set_title(
        f"{result['sampled_groups']} groups sampled, {result['inserted_groups']} selected and inserted; "
        f"{result['bytes']['resident'] / 1000:.0f} kB a group of {result['bytes']['group_size']} x "
        f"{result['bytes']['response_tokens']} tokens",
        fontsize=8,
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
