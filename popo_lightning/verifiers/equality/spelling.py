"""Compares answers letter by letter, without regard to brackets and spaces."""

from __future__ import annotations

import re

from popo_lightning.verifiers.equality.choices import choice_letter
from popo_lightning.verifiers.equality.latex import brackets, parts, without_commands, without_text_commands


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
