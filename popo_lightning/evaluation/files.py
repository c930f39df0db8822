"""Files of an evaluation: one line per response, and all numbers.

They are written under a temporary name and renamed once complete, so an evaluation that is repeated after a crash
replaces what it wrote before.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from popo_lightning.core.groups import Group

ALWAYS_SHOWN = ("level", "subject")


class ReplacedFile:
    """JSON lines that replace an earlier file once all of them are written.

    Args:
        path: The file to replace.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._draft = path.with_name(f"{path.name}.draft")
        self._file = self._draft.open("w", encoding="ascii")  # JSON escapes the rest, lone surrogates included

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds a line."""
        self._file.write(to_json(row) + "\n")

    def finish(self) -> None:
        """Puts the file in its place."""
        self._file.close()
        self._draft.replace(self._path)

    def abandon(self) -> None:
        """Leaves the earlier file as it is."""
        self._file.close()
        self._draft.unlink(missing_ok=True)

    def __enter__(self) -> ReplacedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.finish() if kind is None else self.abandon()


def rank_file(folder: Path, stem: str, rank: int, world_size: int) -> Path:
    """A file of each rank: STEM.jsonl where there is one rank, else STEM.rank0-of-2.jsonl and so on.

    Ranks may have gigabytes of text, so it is not sent to rank 0. Rank 0 removes what a run with another number of
    ranks left, or a reader of STEM*.jsonl would count it too.
    """
    stem = quote(stem, safe=" ")  # a benchmark's name may hold slashes
    part = "" if world_size == 1 else f".rank{rank}-of-{world_size}"
    if rank == 0:
        for path in folder.glob("*.jsonl"):
            found = re.fullmatch(re.escape(stem) + r"(?:\.rank\d+-of-(\d+))?\.jsonl", path.name)
            if found and int(found[1] or 1) != world_size:
                path.unlink()
    return folder / f"{stem}{part}.jsonl"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON document, put in its place when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(to_json(content, indent=2) + "\n", encoding="ascii")
    draft.replace(path)


def sample_rows(
    benchmark: str, greedy: Sequence[Group], sampled: Sequence[Group], fields: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each response, those of a problem together, the most likely one first.

    Args:
        benchmark: Its name.
        greedy: Groups of one most likely response, or nothing.
        sampled: Groups of sampled responses to the same problems, or nothing.
        fields: Of ``Problem.info``, to note beside level and subject.
    """
    for place in range(max(len(greedy), len(sampled))):
        for groups in (greedy, sampled):
            if groups:
                yield from _rows(benchmark, groups[place], groups is greedy, fields)


def _rows(benchmark: str, group: Group, is_greedy: bool, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    problem = group.problem
    info = {field: problem.info.get(field) for field in (*ALWAYS_SHOWN, *fields)}
    if problem.images:
        info["images"] = list(problem.images)
    for number, response in enumerate(group.responses):
        yield info | {
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
        return str(value)  # JSON has no number for it
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
