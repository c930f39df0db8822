r"""Canonical LaTeX, which unifies spellings, and its parts at the top level.

`\dfrac 12`, `\tfrac{1}{2}` and `\frac{1}{2}` become the same text, and so do `90°` and `90^{\circ}`. Nothing is
computed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from popo_lightning.verifiers.equality.commands import (
    ARGUMENTS,
    DROPPED,
    FUNCTIONS,
    INFIX,
    OPERATORS,
    RENAMED,
    prepared,
    tidied,
)

MAX_DEPTH = 24
MAX_TOKENS = 2_500

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"-?\d{1,40}(?:\.\d{1,40})?", re.ASCII)
_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


class UnreadableLatexError(ValueError):
    """The LaTeX is unbalanced, nested too deeply or too long. The message is one sentence."""


def canonical(text: str) -> str:
    """Returns the canonical spelling of a piece of LaTeX.

    Raises:
        UnreadableLatexError: Braces do not match, or the text is nested too deeply or too long for an answer.
    """
    if _PLAIN_NUMBER.fullmatch(text):  # true for most answers
        return text
    tokens = _tokens(text)
    written = _written(tokens, 0)
    while written and written[-1] in ".,;":
        written.pop()
    return tidied(_joined(written))


def without_text_commands(text: str) -> str:
    r"""Unwraps `\text{...}` and removes all spaces in canonical text, for comparison letter by letter."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).replace(" ", "")


def without_commands(text: str) -> str:
    """Replaces each LaTeX command by a space."""
    return re.sub(r"\\[A-Za-z]+", " ", text)


def parts(text: str, separator: str) -> list[str]:
    """Splits canonical text at single tokens, outside all brackets, that match a regular expression."""
    cut, depth, found = re.compile(separator), 0, [""]
    for token in _TOKEN.findall(text):
        if depth == 0 and cut.fullmatch(token):
            found.append("")
            continue
        depth += (token in _OPENING) - (token in _OPENING.values())
        found[-1] += token
    return [part.strip() for part in found]


def brackets(text: str) -> tuple[str, str, str] | None:
    """Returns (opening, inside, closing) if a pair of brackets, perhaps of an interval, encloses all the text."""
    tokens = _TOKEN.findall(text)
    closings = frozenset(_OPENING.values())
    if len(tokens) < 2 or tokens[0] not in _OPENING or tokens[-1] not in closings:
        return None
    depth = 0
    for place, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in closings)
        if depth == 0 and place < len(tokens) - 1:
            return None
    return (tokens[0], "".join(tokens[1:-1]), tokens[-1]) if depth == 0 else None


def has_letters(text: str) -> bool:
    """Returns whether the text has letters outside commands."""
    return re.search(r"[A-Za-z]", without_commands(text)) is not None


def commands(text: str) -> set[str]:
    """Returns the LaTeX commands in a text."""
    return set(re.findall(r"\\[A-Za-z]+", text))


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    for token in _TOKEN.findall(prepared(text)):
        token = RENAMED.get(token, token)
        if token in DROPPED:
            continue
        if token.isspace():
            token = " "
        tokens += ["^", r"\circ"] if token == r"^\circ" else [token]
    if len(tokens) > MAX_TOKENS:
        raise UnreadableLatexError(f"it has over {MAX_TOKENS} tokens")
    return _without_spaces(tokens)


def _without_spaces(tokens: Sequence[str]) -> list[str]:
    r"""Removes spaces without meaning.

    Spaces stay between digits (`5 5` is not 55), between the words of a `\text{...}`, and after the comma of `7, 100`,
    which is not 7,100.
    """
    kept: list[str] = []
    depth = 0  # depth of braces inside a \text
    for place, token in enumerate(tokens):
        if token == "{":
            depth += bool(depth) or kept[-1:] == [r"\text"]
        elif token == "}":
            depth -= bool(depth)
        if token not in (" ", r"\,"):
            kept.append(token)
            continue
        before, after = kept[-1] if kept else "", tokens[place + 1] if place + 1 < len(tokens) else ""
        if depth:
            tells = (before.isalnum() or before == "}") and after.isalpha()
        elif before == ",":
            tells = token == " " and kept[-2:-1] != [] and kept[-2].isdigit() and _begins_with_thousands(tokens, place)
        else:
            tells = token == " " and before.isdigit() and after.isdigit()
        if tells:
            kept.append(" ")
    return kept


def _begins_with_thousands(tokens: Sequence[str], place: int) -> bool:
    """Returns whether exactly three digits follow, which would belong to a number without the space before them."""
    after = [token.isdigit() for token in tokens[place + 1 : place + 5]]
    return after[:3] == [True, True, True] and after[3:] != [True]


def _written(tokens: Sequence[str], depth: int) -> list[str]:
    if depth > MAX_DEPTH:
        raise UnreadableLatexError(f"it is nested over {MAX_DEPTH} deep")
    infix = _infix(tokens)
    if infix is not None:
        above, below = _written(tokens[:infix], depth + 1), _written(tokens[infix + 1 :], depth + 1)
        return [INFIX[tokens[infix]], "{", *above, "}", "{", *below, "}"]
    written: list[str] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        place += 1
        if token == "}":
            raise UnreadableLatexError("its braces do not match")
        if token == "{":
            inside, place = _group(tokens, place, depth)
            holds_everything = not written and place == len(tokens)
            written += inside if holds_everything or len(inside) == 1 else ["{", *inside, "}"]
            continue
        written.append(token)
        if token == r"\sqrt" and place < len(tokens) and tokens[place] == "[":
            index = _closing(tokens, place, "]")
            written += ["[", *_written(tokens[place + 1 : index], depth + 1), "]"]
            place = index + 1
        if token == r"\operatorname" and tokens[place : place + 1] == ["*"]:
            place += 1
        for _ in range(ARGUMENTS.get(token, 0)):
            argument, place = _argument(tokens, place, depth, token)
            if token in (r"\text", r"\operatorname"):
                written[-1:] = _named(argument, OPERATORS if token == r"\operatorname" else FUNCTIONS)
            elif written[-2:] == [r"\log", "_"]:  # \log_23 becomes \log_{2}3, which no reader takes as base 23
                place += tokens[place : place + 1] == [" "]
                written += ["{", *argument, "}"]
            elif token == "^" and set(argument) == {"'"}:
                written[-1:] = argument
            elif token in ("^", "_") and len(argument) == 1 and not _runs_on(argument[0], tokens, place):
                written += argument
            elif token == "_" and (base := re.fullmatch(r"\((\d+)\)", "".join(argument))):  # 52_{(8)}
                written += base[1] if len(argument) == 3 else ["{", *base[1], "}"]
            else:
                written += ["{", *argument, "}"]
    return written


def _runs_on(argument: str, tokens: Sequence[str], place: int) -> bool:
    """Returns whether a digit follows an exponent or index that is a digit: `x^{1}2` is not `x^{12}`."""
    place += tokens[place : place + 1] == [" "]
    return argument.isdigit() and place < len(tokens) and tokens[place].isdigit()


def _infix(tokens: Sequence[str]) -> int | None:
    r"""Returns the index of `\over` or `\choose` outside all braces; None without one."""
    if r"\over" not in tokens and r"\choose" not in tokens:
        return None
    depth = 0
    for place, token in enumerate(tokens):
        depth += (token == "{") - (token == "}")
        if depth == 0 and token in INFIX:
            return place
    return None


def _named(argument: list[str], functions: frozenset[str]) -> list[str]:
    r"""Resolves `\text{name}` to a function, a constant, or a word."""
    name = "".join(argument)
    if name in functions:
        return ["\\" + name]
    return argument if name in ("e", "i") else [r"\text", "{", *argument, "}"]


def _group(tokens: Sequence[str], start: int, depth: int) -> tuple[list[str], int]:
    end = _closing(tokens, start - 1, "}")
    return _written(tokens[start:end], depth + 1), end + 1


def _argument(tokens: Sequence[str], place: int, depth: int, command: str) -> tuple[list[str], int]:
    place += place < len(tokens) and tokens[place] == " "
    if place >= len(tokens) or tokens[place] == "}":
        raise UnreadableLatexError(f"{command} lacks an argument")
    if tokens[place] == "{":
        return _group(tokens, place + 1, depth)
    end = place + 1
    if command == r"\sqrt" and tokens[place] == "(":
        end = _closing(tokens, place, ")")
        return _written(tokens[place + 1 : end], depth + 1), end + 1
    if command == r"\sqrt" and tokens[place].isdigit():  # √15 is meant as √(15), though TeX reads one character
        end = _after_number(tokens, place)
    elif command == "^":  # 10^12 is meant as 10^{12}, x^-1 as x^{-1}, though TeX reads one character
        end += tokens[place] in "+-" and end < len(tokens)
        while tokens[end - 1].isdigit() and end < len(tokens) and tokens[end].isdigit():
            end += 1
    elif tokens[place] in ARGUMENTS and depth < MAX_DEPTH:  # \frac\sqrt3 2
        inner: list[str] = [tokens[place]]
        for _ in range(ARGUMENTS[tokens[place]]):
            argument, end = _argument(tokens, end, depth + 1, "")
            inner += ["{", *argument, "}"]
        return inner, end
    return list(tokens[place:end]), end


def _closing(tokens: Sequence[str], start: int, closing: str) -> int:
    level = 0
    for place in range(start, len(tokens)):
        level += (tokens[place] == tokens[start]) - (tokens[place] == closing)
        if level == 0:
            return place
    raise UnreadableLatexError(f"its {'braces' if closing == '}' else 'brackets'} do not match")


def _after_number(tokens: Sequence[str], place: int) -> int:
    while place < len(tokens) and tokens[place].isdigit():
        place += 1
    if tokens[place : place + 1] == ["."] and place + 1 < len(tokens) and tokens[place + 1].isdigit():
        place += 1
        while place < len(tokens) and tokens[place].isdigit():
            place += 1
    return place


def _joined(tokens: Sequence[str]) -> str:
    """Joins tokens to text, with a space only between a command and a letter."""
    pieces: list[str] = []
    for token in tokens:
        if pieces and token[0].isalpha() and re.fullmatch(r"\\[A-Za-z]+", pieces[-1]):
            pieces.append(" ")
        pieces.append(token)
    return "".join(pieces)
