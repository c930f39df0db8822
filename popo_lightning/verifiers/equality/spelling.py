r"""Compares answers letter by letter, without brackets and spaces, and reads choices: `(C)`, `\textbf{(C)}\ 14`."""

from __future__ import annotations

import re

from popo_lightning.verifiers.equality.latex import brackets, parts, without_commands, without_text_commands

_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|\.){0,2}")
_WITH_TEXT = re.compile(r"(?:\\text\{\(?([A-H])[).:]+\}|\\text\{\(?([A-H])[).:]+(?=[^}])|\(?([A-H])\))(.+)", re.DOTALL)
_ANOTHER = re.compile(r"^\}?(?:\\text\{)?,?(?:or|and|[,;])|\(?[A-H]\)|\\text\{\(?[A-H]\)?\}")


def spelled_alike(gold: str, answer: str) -> bool:
    """Returns whether two answers are the same except for spaces, brackets, and the letter case of words."""
    if gold.replace(", ", ",") == answer.replace(", ", ","):
        return True
    if re.search(r"\d \d", gold + answer):  # "5 5" is not 55
        return False
    one, other = without_text_commands(gold), without_text_commands(answer)
    letters = choice_letter(one), choice_letter(other)
    if letters[0] and letters[1]:
        return letters[0] == letters[1]
    if one == other:
        return bool(one)
    return re.fullmatch(r"[A-Za-z]{2,}", one) is not None and one.casefold() == other.casefold()


def without_brackets(text: str) -> str:
    """Removes brackets, or a text command, that only enclose an answer."""
    if text.startswith(r"\text{") and re.search(r"\d", text) and not re.search(r"[A-Za-z]{2}", without_commands(text)):
        inner = brackets(text.removeprefix(r"\text"))  # numbers in bold
        return text if inner is None else inner[1]
    inner = brackets(text)
    if inner is None or inner[0] not in "({" or len(parts(inner[1], ",")) > 1:
        return text
    return inner[1] if inner[0] + inner[2] in ("()", "{}") else text


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
