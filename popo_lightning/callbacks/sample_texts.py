"""Samples for TensorBoard's text tab: the prompt, the gold answer, and each response marked right or wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from popo_lightning.core.markdown import markdown_table

RIGHT, WRONG = "✓ right", "✗ wrong"
HEADER = ("", "response", "score", "advantage", "age", "tokens", "end")


def sample_text(rows: Sequence[Mapping[str, Any]], image_tags: Mapping[int, Sequence[str]]) -> str:
    """Markdown of rows of samples.jsonl, one group after another.

    Args:
        rows: Rows of one iteration, with those of a group next to each other.
        image_tags: Tags under which the images of a group are shown, by the group's id.
    """
    parts = []
    for group, of_group in groupby(rows, key=lambda row: row["group"]):
        mine = list(of_group)
        parts.append(markdown_table(("group", _title(mine)), _asked(mine[0], image_tags.get(group, ()))))
        parts.append(markdown_table(HEADER, map(_cells, mine)))
    return "\n\n".join(parts)


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether the verifier accepted the response's answer."""
    return row["parts"].get("acc", 0.0) > 0


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    """Heading of a group. It holds no model output, since headings are not escaped."""
    first = rows[0]
    age = max(row["age"] for row in rows)
    origin = "fresh" if first["fresh"] else f"replayed, {age} version{'s' * (age != 1)} old"
    return f"{sum(map(is_right, rows))} of {len(rows)} right, {origin}"


def _asked(row: Mapping[str, Any], image_tags: Sequence[str]) -> Iterator[tuple[str, str]]:
    yield "problem", str(row["problem"])
    if isinstance(row["prompt"], str):
        yield "prompt", row["prompt"]
    else:
        for message in row["prompt"]:
            content = message.get("content")
            yield str(message.get("role")), content if isinstance(content, str) else _shown(content)
    if image_tags:
        yield "images", f"{', '.join(image_tags)} under Images"
    yield "gold", _shown(row["answer"])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    advantage = "" if row["advantage"] is None else f"{row['advantage']:+.3f}"
    numbers = (f"{row['score']:g}", advantage, str(row["age"]), str(row["tokens"]), row["finish_reason"])
    return (RIGHT if is_right(row) else WRONG, row["response"], *numbers)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
