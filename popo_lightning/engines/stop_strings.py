"""Strings that end a response, for policies that do not end by themselves: base models asked in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPARE_TOKENS = 16  # tokens at a response's end that are read besides those that may form a stop string


class StopStrings:
    """Finds where the text of a response first contains one of several strings.

    Every engine ends a response by this rule, so all keep the same tokens: those up to the one that completes the
    string. These tokens were sampled, so they stay in the response and are trained on; this is how a policy learns
    where to end. Tokens after them are discarded as if they had never been sampled. Verifiers read the text before the
    string. Special tokens have no text, and complete no string.

    Args:
        tokenizer: Decodes tokens.
        strings: Nonempty strings.

    Attributes:
        tail: Number of last tokens of an unfinished response that contain the string if one of the latest tokens
            completed it.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        self.tail = SPARE_TOKENS + max((len(string.encode()) for string in strings), default=0)

    def __bool__(self) -> bool:
        return bool(self.strings)

    def found(self, text: str, begin: int = 0) -> int | None:
        """Index of the first string in a text at or after `begin`; None if there is none."""
        return min((place for string in self.strings if (place := text.find(string, begin)) >= 0), default=None)

    def cut(self, ids: Sequence[int]) -> tuple[int, str] | None:
        """(number of tokens until the first string is complete, the text before the string); None if there is none."""
        if not self.strings or self.found(self._text(ids)) is None:
            return None
        below, enough = 0, len(ids)  # a text that contains a string still does with more tokens
        while enough - below > 1:
            middle = (below + enough) // 2
            below, enough = (below, middle) if self.found(self._text(ids[:middle])) is not None else (middle, enough)
        text = self._text(ids[:enough])
        return enough, text[: self.found(text)]

    def among(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Indices of the rows of tokens whose text contains a string."""
        texts = self.tokenizer.batch_decode(list(rows), skip_special_tokens=True)
        return [place for place, text in enumerate(texts) if self.found(text) is not None]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
