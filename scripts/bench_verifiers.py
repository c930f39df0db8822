"""Milliseconds per response of each verifier on the data sets of a folder.

    python scripts/bench_verifiers.py DATA_FOLDER [--rows 300] [--output benchmarks/verifiers.json]

Reads `math/*.jsonl`, `geometry/*.jsonl` and `planning/*.jsonl`. A row has `id`, `answer` and, for planning,
`numbers`, `target` and `example_solution`; a planning set without solutions is left out. Each row is graded three
times: its gold, another row's gold, and its gold with the last number increased by one. Nothing is graded twice, so
caches have only golds, as in a run.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import re
import statistics
import time
from pathlib import Path
from typing import Any

from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.countdown import CountdownVerifier
from popo_lightning.verifiers.geometry import GeometryVerifier
from popo_lightning.verifiers.math import MathVerifier

KINDS: dict[str, type[Verifier]] = {"math": MathVerifier, "geometry": GeometryVerifier, "planning": CountdownVerifier}


def main() -> None:
    """Time all data sets, print a Markdown table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=300, help="random rows of each data set")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/verifiers.json"))
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for kind, verifier_class in KINDS.items():
        # As in a grading process, loading computer algebra belongs to the start, not to the first response.
        verifier = pickle.loads(pickle.dumps(verifier_class()))
        for path in sorted((arguments.folder / kind).glob("*.jsonl")):
            with path.open() as file:
                rows = [json.loads(line) for line in file]
            if "numbers" in rows[0] and not all(row.get("example_solution") for row in rows):
                continue  # it has no correct response
            results.append(timed(path.stem, verifier, rows, arguments.rows))
    if not results:
        parser.error(f"{arguments.folder} has no math/*.jsonl, geometry/*.jsonl or planning/*.jsonl")
    print(table(results))
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def timed(name: str, verifier: Verifier, rows: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Times of `check_answer` over all rows and of grading over a sample."""
    sample = random.Random(3).sample(rows, min(most, len(rows)))
    begin = time.perf_counter()
    refused = sum(not accepted(verifier, gold(row)) for row in rows)
    check_seconds = time.perf_counter() - begin
    times, right = [], 0
    for row in sample:
        for text in responses(row, random.Random(row["id"]).choice(rows)):
            begin = time.perf_counter()
            right += int(verifier(gold(row), text)["acc"])
            times.append((time.perf_counter() - begin) * 1000)
    times.sort()
    return {
        "data_set": name,
        "verifier": type(verifier).__name__,
        "rows": len(rows),
        "golds_refused": refused,
        "check_all_golds_seconds": round(check_seconds, 3),
        "responses": len(times),
        "right": right,
        "median_ms": round(statistics.median(times), 3),
        "p99_ms": round(times[int(0.99 * (len(times) - 1))], 2),
        "max_ms": round(times[-1], 1),
    }


def accepted(verifier: Verifier, answer: Any) -> bool:
    """Whether the verifier accepts the gold."""
    try:
        verifier.check_answer(answer)
    except ValueError:
        return False
    return True


def gold(row: dict[str, Any]) -> Any:
    """The gold answer as a task passes it to the verifier."""
    if "numbers" in row:
        return {"numbers": row["numbers"], "target": row["target"]}
    return row.get("answers_all", row["answer"])


def responses(row: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """A correct response, a plausible wrong one and one that is off by one."""
    thought = "<think>" + "Let me see. " * 300 + "</think> "
    if "numbers" in row:
        written = [source["example_solution"] for source in (row, other)]
        return [f"{thought}<answer>{text}</answer>" for text in [*written, one_more(written[0])]]
    return [f"{thought}\\boxed{{{text}}}" for text in (row["answer"], other["answer"], one_more(row["answer"]))]


def one_more(text: str) -> str:
    """The text with its last number increased by one."""
    last = re.search(r"\d+(?!.*\d)", text, re.DOTALL)
    return text[: last.start()] + str(int(last[0]) + 1) + text[last.end() :] if last else text + "+1"


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| data set | verifier | responses | median ms | p99 ms | max ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        names = f"| {r['data_set']} | {r['verifier']} | {r['responses']}"
        lines.append(f"{names} | {r['median_ms']} | {r['p99_ms']} | {r['max_ms']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
