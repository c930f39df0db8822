"""Strings that end a response, for policies that do not end by themselves: base models asked in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPARE_TOKENS = 16  # of a response's end that are read besides those that may make up a stop string


class StopStrings:
    """Where the text of a response first has one of some strings.

    Every engine ends a response by this, whatever it stops at by itself, so that all keep the same tokens: those up to
    the one that completes the string. They were sampled, so they stay in the response and are trained on: that is how a
    policy learns to end, or not to end, there. What comes behind them is as if it had never been sampled. The text that
    verifiers read ends before the string. Special tokens are no text, and complete no string.

    Args:
        tokenizer: Decodes.
        strings: None of them empty.

    Attributes:
        tail: Tokens at the end of a response under way that have the string, if it has come with one of the last few.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        self.tail = SPARE_TOKENS + max((len(string.encode()) for string in strings), default=0)

    def __bool__(self) -> bool:
        return bool(self.strings)

    def found(self, text: str, begin: int = 0) -> int | None:
        """Place of the first string in a text, from some place on; None without any."""
        return min((place for string in self.strings if (place := text.find(string, begin)) >= 0), default=None)

    def cut(self, ids: Sequence[int]) -> tuple[int, str] | None:
        """(tokens up to and with the one that completes the first string, the text before it); None without any."""
        if not self.strings or self.found(self._text(ids)) is None:
            return None
        below, enough = 0, len(ids)  # a text that has a string keeps it however much follows
        while enough - below > 1:
            middle = (below + enough) // 2
            below, enough = (below, middle) if self.found(self._text(ids[:middle])) is not None else (middle, enough)
        text = self._text(ids[:enough])
        return enough, text[: self.found(text)]

    def among(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Places of the rows of tokens whose text has a string."""
        texts = self.tokenizer.batch_decode(list(rows), skip_special_tokens=True)
        return [place for place, text in enumerate(texts) if self.found(text) is not None]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
