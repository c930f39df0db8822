r"""Letters of choices, alone or with their text: `(C)`, `\textbf{(C)}\ 14`."""

from __future__ import annotations

import re

_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|\.){0,2}")
_WITH_TEXT = re.compile(r"(?:\\text\{\(?([A-H])[).:]+\}|\\text\{\(?([A-H])[).:]+(?=[^}])|\(?([A-H])\))(.+)", re.DOTALL)
_ANOTHER = re.compile(r"^\}?(?:\\text\{)?,?(?:or|and|[,;])|\(?[A-H]\)|\\text\{\(?[A-H]\)?\}")


def choice_letter(text: str) -> str | None:
    """Returns the letter of `(C)`, `C.` or `C`, in text without commands; None for anything else."""
    match = _LETTER.fullmatch(text)
    return match[1] if match else None


def choice_with_text(text: str) -> tuple[str, str] | None:
    r"""Returns (letter, text) of canonical `\text{(C)}14`, `\text{(C)14}` and `(C)14`; None for anything else."""
    match = _WITH_TEXT.fullmatch(text) if text[:1] in ("\\", "(") or text[1:2] == ")" else None
    if match is None or _ANOTHER.search(match[4]):
        return None
    rest = r"\text{" + match[4] if match[2] else match[4]
    return match[1] or match[2] or match[3], rest
