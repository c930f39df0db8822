"""Files of an evaluation: one line per response, and all numbers.

They are written under a temporary name and renamed once complete, so an evaluation that is repeated after a crash
replaces what it wrote before.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from popo_lightning.core.groups import Group
from popo_lightning.core.ranks import part_of_rank
from popo_lightning.core.whole_files import replaced

ALWAYS_SHOWN = ("level", "subject")


def write_rows(file: IO[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines."""
    file.writelines(to_json(row) + "\n" for row in rows)


def rank_file(folder: Path, stem: str, rank: int, world_size: int) -> Path:
    """Path of a rank's file: STEM.jsonl for a single rank, else STEM.rank0-of-2.jsonl and so on. Makes the folder.

    Ranks may have gigabytes of text, so it is not sent to rank 0. Rank 0 removes the files of a run with another number
    of ranks, since a reader of STEM*.jsonl would count them too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = quote(stem, safe=" ")  # a benchmark's name may hold slashes
    if rank == 0:
        for path in folder.glob("*.jsonl"):
            found = re.fullmatch(re.escape(stem) + r"(?:\.rank\d+-of-(\d+))?\.jsonl", path.name)
            if found and int(found[1] or 1) != world_size:
                path.unlink()
    return folder / f"{stem}{part_of_rank(rank, world_size)}.jsonl"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON document, which is moved into place when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(to_json(content, indent=2) + "\n")


def sample_rows(
    benchmark: str,
    greedy: Sequence[Group],
    sampled: Sequence[Group],
    fields: Sequence[str],
    kept: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yields a row for each response, grouped by problem, with the greedy response first.

    Args:
        benchmark: Name of the benchmark.
        greedy: Groups of one greedy response each; empty without them.
        sampled: Groups of sampled responses to the same problems; empty without them.
        fields: Fields of ``Problem.info`` to write besides level and subject.
        kept: Ids of the problems whose sampled responses are written with tokens and log-probs.
    """
    for place in range(max(len(greedy), len(sampled))):
        if greedy:
            yield from _rows(benchmark, greedy[place], True, fields, False)
        if sampled:
            yield from _rows(benchmark, sampled[place], False, fields, sampled[place].problem.id in kept)


def _rows(
    benchmark: str, group: Group, is_greedy: bool, fields: Sequence[str], is_kept: bool
) -> Iterator[dict[str, Any]]:
    problem = group.problem
    info = {field: problem.info.get(field) for field in (*ALWAYS_SHOWN, *fields)}
    if problem.images:
        info["images"] = list(problem.images)
    for number, response in enumerate(group.responses):
        tokens = _tokens(group, number) if is_kept else {}
        yield (
            info
            | {
                "benchmark": benchmark,
                "problem": problem.id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "greedy": is_greedy,
                "sample": number,
                "response": response.text,
                "score": response.parts.get("score", 0.0),
                "acc": response.parts.get("acc", 0.0),
                "parts": response.parts,
                "failure": response.failure,
                "finish_reason": response.finish_reason,
                "tokens": len(response.token_ids),
            }
            | tokens
        )


def _tokens(group: Group, number: int) -> dict[str, Any]:
    """What a forward pass needs of a response. The prompt's tokens are written with a problem's first response."""
    response = group.responses[number]
    found = {"token_ids": response.token_ids.tolist(), "behave_logp": response.behave_logp.tolist()}
    return found if number else {"prompt_ids": group.prompt_ids.tolist()} | found


def to_json(content: Any, indent: int | None = None) -> str:
    """Strict JSON in ASCII of any value from a data file or a policy."""
    return json.dumps(_plain(content), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return f"({len(value)} bytes)"  # an image
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
