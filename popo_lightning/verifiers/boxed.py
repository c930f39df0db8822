"""Finds the answer in a response: the last box, the last answer tag, the text after the thinking."""

from __future__ import annotations

import re

MAX_ANSWER_CHARACTERS = 2_000
"""Longer answers do not count. The longest gold of the usual data sets has 1,222 characters."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[^\s$,;{}\\]+")
_THINK_END = "</think>"


def after_thinking(text: str, required: bool = False) -> str | None:
    """Returns the text after the last `</think>`. Without that tag it is the whole text, or None if required."""
    _, tag, rest = text.rpartition(_THINK_END)
    if tag:
        return rest
    return None if required else text


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` (or `\fbox{...}`, `\boxed 5`), or None if there is none.

    It is also None if the last box is empty, not closed or longer than `MAX_ANSWER_CHARACTERS`, because an earlier box
    is a step of the response, not its answer. The time is linear in the length of the text.
    """
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    while start >= 0:
        opening = _BOX.match(text, start)
        if opening is not None:
            return _content(text, opening.end())
        start = max(text.rfind(r"\boxed", 0, start), text.rfind(r"\fbox", 0, start))  # \boxedtext is another command
    return None


def last_answer_tag(text: str) -> str | None:
    """Returns the text between the last closed `<answer>` and the first `</answer>` after it.

    It is None if the text is too long or there is no pair. The time is linear in the length of the text.
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, content = before.rpartition("<answer>")
    content, _, _ = content.partition("</answer>")
    if not (closed and opened) or len(content) > MAX_ANSWER_CHARACTERS:
        return None
    return content.strip()


def _content(text: str, start: int) -> str | None:
    window = text[start : start + MAX_ANSWER_CHARACTERS + 2]
    if not window.startswith("{"):
        bare = _BARE.match(window)
        return bare[0] if bare else None
    depth, escaped = 0, False
    for place, character in enumerate(window):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return window[1:place].strip() or None
    return None
