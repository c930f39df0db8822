"""Tables for TensorBoard's text tab, with cells escaped so that no text breaks the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Cells are shown as code: model output is text, not markup."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = text.replace("\r", "\n").replace("\n", " ⏎ ")  # Markdown ends a line at either
    text = "".join(character if character.isprintable() else "?" for character in text)
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else ""
