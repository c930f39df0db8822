"""Finds by hand where a response has to end at a stop string."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from popo_lightning.core.groups import Response


def first_by_hand(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> tuple[int, str] | None:
    """Decodes one token more at a time until a stop string appears."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        places = [text.index(string) for string in stop if string in text]
        if places:
            return count, text[: min(places)]
    return None


def common(sampled: list[list[Response]], length: int) -> str:
    """Returns the most common piece of the given length inside the responses' texts."""
    texts = [r.text for responses in sampled for r in responses]
    pieces = Counter(text[i : i + length] for text in texts for i in range(1, len(text) - length))
    return pieces.most_common(1)[0][0]
