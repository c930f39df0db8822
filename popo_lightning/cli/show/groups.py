"""Reads groups of responses that a run wrote: those it trained on, and those of its last evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from popo_lightning.cli.show.run_files import EVALUATIONS, SAMPLES, Skipped, finite, response_rows

SHOWN_CHARACTERS = 4000
OWN_FIELDS = (
    *("benchmark", "problem", "prompt", "answer", "greedy", "sample", "response", "score", "acc", "parts"),
    *("failure", "finish_reason", "tokens", "images"),
)  # fields of every line of an evaluation; it is broken down by the others


@dataclass
class Groups:
    """Groups of a file that are shown.

    Args:
        shown: Groups as the page reads them.
        left_out: Number of responses that are not shown.
    """

    shown: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0


Rows = list[dict[str, Any]]


def trained_groups(folder: Path, limit: int, skipped: Skipped) -> Groups:
    """Groups of samples.jsonl, spread evenly over the run if there are too many.

    Args:
        folder: Folder of the run.
        limit: Maximum number of responses.
        skipped: Counts damaged lines.
    """

    def plain(rows: Rows) -> dict[str, Any]:
        return _plain(rows) | {"iteration": finite(rows[0].get("iteration"))}

    files = [SAMPLES] if (folder / SAMPLES).is_file() else []
    return _chosen(folder, files, ("iteration", "group", "problem"), limit, skipped, plain)


def evaluated_groups(folder: Path, evaluation: dict[str, Any], limit: int, skipped: Skipped) -> Groups:
    """Groups of an evaluation, spread evenly over its problems if there are too many.

    Args:
        folder: Folder of the run.
        evaluation: Results of the evaluation, with its folder's name as ``label``.
        limit: Maximum number of responses.
        skipped: Counts damaged lines.
    """

    def plain(rows: Rows) -> dict[str, Any]:
        first = rows[0]
        known = {name: value for name, value in first.items() if name not in OWN_FIELDS and value is not None}
        return _plain(rows) | {
            "evaluated": _text(first.get("benchmark"), 200) or evaluation["label"],
            "iteration": evaluation["iteration"],
            "info": {name[:60]: _text(value, 200) for name, value in list(known.items())[:12]},
        }

    place = f"{EVALUATIONS}/{evaluation['label']}"
    files = [f"{place}/{path.name}" for path in sorted((folder / place).glob("*.jsonl"))]
    return _chosen(folder, files, ("benchmark", "problem"), limit, skipped, plain)


def _chosen(
    folder: Path,
    files: Sequence[str],
    key: Sequence[str],
    limit: int,
    skipped: Skipped,
    plain: Callable[[Rows], dict[str, Any]],
) -> Groups:
    """Groups of files in a folder: adjacent rows with the same values of the key's fields.

    The files are read twice, so that only the shown groups of large ones are in memory.
    """

    def groups(skipped: Skipped) -> Iterator[Rows]:
        for name in files:
            rows = response_rows(folder / name, name, skipped)
            for _, group in groupby(rows, key=lambda row: json.dumps([row.get(part) for part in key])):
                yield list(group)

    sizes = [len(rows) for rows in groups(skipped)]
    share = min(1.0, limit / sum(sizes)) if sizes else 0.0
    found, kept = Groups(), 0
    for place, rows in enumerate(groups(Skipped())):
        spread = math.floor((place + 1) * share) > math.floor(place * share)
        if spread and kept + len(rows) <= limit:
            kept += len(rows)
            found.shown.append(plain(rows))
    found.left_out = sum(sizes) - kept
    return found


def _plain(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A group with only what the page shows."""
    first = rows[0]
    fresh = first.get("fresh")
    if not isinstance(fresh, bool):  # written by an earlier version
        fresh = first.get("age") == 0 if isinstance(first.get("age"), int) else None
    images = first.get("images")
    return {
        "problem": _text(first.get("problem"), 500),
        "prompt": _prompt(first.get("prompt")),
        "gold": _text(first.get("answer"), SHOWN_CHARACTERS),
        "fresh": fresh,
        "images": [image for image in images if isinstance(image, str)] if isinstance(images, list) else [],
        "responses": [_response(row) for row in rows],
    }


def _response(row: dict[str, Any]) -> dict[str, Any]:
    given = row.get("parts")
    parts = dict(list(given.items())[:20]) if isinstance(given, dict) else {}
    right = finite(parts.get("acc", row.get("acc", row.get("score"))))
    text = row["response"]
    content = {
        "cut": max(0, len(text) - SHOWN_CHARACTERS),
        "right": right is not None and right > 0,
        "score": finite(row.get("score")),
        "parts": {_text(name, 60): number for name, part in parts.items() if (number := finite(part)) is not None},
        "advantage": finite(row.get("advantage")),
        "age": finite(row.get("age")),
        "tokens": finite(row.get("tokens")),
        "end": _text(row.get("finish_reason"), 60),
        "failure": _text(row.get("failure"), 500),
        "greedy": row.get("greedy") is True,
    }
    told = {
        name: value
        for name, value in content.items()
        if value is not None and value is not False and value not in ("", {})
    }
    return {"text": text[:SHOWN_CHARACTERS], "cut": 0} | told


def _prompt(prompt: Any) -> list[dict[str, str]]:
    """Messages of a prompt; plain text is one message without a role."""
    if not isinstance(prompt, list):
        return [{"role": "", "text": _text(prompt, SHOWN_CHARACTERS)}]
    messages = [message for message in prompt if isinstance(message, dict)]
    return [
        {"role": _text(message.get("role"), 60), "text": _text(message.get("content"), SHOWN_CHARACTERS)}
        for message in messages
    ]


def _text(value: Any, limit: int) -> str:
    if value is None:
        return ""
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[:limit]
