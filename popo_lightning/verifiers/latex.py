r"""One spelling for each piece of LaTeX: canonical text, and its parts at the top level.

`\dfrac 12`, `\tfrac{1}{2}` and `\frac{1}{2}` are one text afterwards, as are `90°` and `90^{\circ}`. Nothing is
computed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_DEPTH = 24
MAX_TOKENS = 2_500

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
        "∞": r"\infty ", "√": r"\sqrt ", "°": r"^\circ ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ",
        "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "²": "^2", "³": "^3", "±": r"\pm ", "θ": r"\theta ",
        "∠": r"\angle ", "≅": r"\cong ", "’": "'", "′": "'", "€": "", "£": "",
    }
)  # fmt: skip
_DROPPED = frozenset(
    {"$", r"\$", r"\,", r"\!", r"\;", r"\:", r"\(", r"\)", r"\[", r"\]", r"\left", r"\right", r"\big", r"\Big",
     r"\bigg", r"\Bigg", r"\bigl", r"\bigr", r"\Bigl", r"\Bigr", r"\displaystyle", r"\textstyle", r"\limits", r"\quad",
     r"\qquad", r"\hline", r"\rm", r"\pounds", r"\euro",
     r"\boldsymbol", r"\bm", "\\"}
)  # fmt: skip
_RENAMED = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\geqslant": r"\geq", r"\ge": r"\geq",
    r"\leqslant": r"\leq", r"\le": r"\leq", r"\ne": r"\neq", r"\lt": "<", r"\gt": ">", r"\lbrace": r"\{",
    r"\rbrace": r"\}", r"\varnothing": r"\emptyset", r"\imath": "i", r"\lvert": "|", r"\rvert": "|", r"\vert": "|",
    r"\mathrm": r"\text", r"\textbf": r"\text", r"\mathbf": r"\text", r"\mbox": r"\text", r"\textnormal": r"\text",
    r"\textrm": r"\text", r"\textsc": r"\text", r"\textit": r"\text", r"\mathit": r"\text", r"\hbox": r"\text",
    r"\operatorname": r"\text", r"\prime": "'", r"\to": r"\rightarrow", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
    r"\degree": r"^\circ", r"\degrees": r"^\circ", r"\*": "*", r"\implies": r"\Rightarrow", r"\colon": ":",
    r"\%": "%",
}  # fmt: skip
_ARGUMENTS = {r"\frac": 2, r"\sqrt": 1, r"\text": 1, r"\binom": 2, r"\overline": 1, "^": 1, "_": 1}
_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


class UnreadableLatexError(ValueError):
    """Unbalanced, too deep or too long; the message is one sentence."""


def canonical(text: str) -> str:
    """The one spelling of a piece of LaTeX.

    Raises:
        UnreadableLatexError: Braces do not match, or nesting or length is beyond any answer.
    """
    tokens = _tokens(text)
    written = _written(tokens, 0)
    while written and written[-1] in ".,;":
        written.pop()
    return _joined(written)


def without_text_commands(text: str) -> str:
    r"""Canonical text with `\text{...}` opened and all spaces gone, for comparison letter by letter."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).replace(" ", "")


def without_commands(text: str) -> str:
    """The text with a space for each LaTeX command."""
    return re.sub(r"\\[A-Za-z]+", " ", text)


def parts(text: str, separator: str) -> list[str]:
    """Canonical text cut at a regular expression that matches single tokens outside all brackets."""
    cut, depth, found = re.compile(separator), 0, [""]
    for token in _TOKEN.findall(text):
        if depth == 0 and cut.fullmatch(token):
            found.append("")
            continue
        depth += (token in _OPENING) - (token in _OPENING.values())
        found[-1] += token
    return [part.strip() for part in found]


def brackets(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) where one pair of brackets, matching or as of an interval, holds all of the text."""
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


def commands(text: str) -> set[str]:
    """The LaTeX commands in a text."""
    return set(re.findall(r"\\[A-Za-z]+", text))


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    for token in _TOKEN.findall(text.translate(_CHARACTERS).replace("{,}", ",")):
        token = _RENAMED.get(token, token)
        if token in _DROPPED:
            continue
        if token.isspace() or token in ("~", "\\ "):
            token = " "
        tokens += ["^", r"\circ"] if token == r"^\circ" else [token]
    if len(tokens) > MAX_TOKENS:
        raise UnreadableLatexError(f"it has over {MAX_TOKENS} tokens")
    return _without_spaces(tokens)


def _without_spaces(tokens: Sequence[str]) -> list[str]:
    r"""Spaces kept only between digits (`5 5` is not 55) and between the words of a `\text{...}`."""
    kept: list[str] = []
    in_text = False
    for place, token in enumerate(tokens):
        if token == "{":
            in_text = in_text or kept[-1:] == [r"\text"]
        elif token == "}":
            in_text = False
        if token != " ":
            kept.append(token)
            continue
        before, after = kept[-1] if kept else "", tokens[place + 1] if place + 1 < len(tokens) else ""
        if (before.isdigit() and after.isdigit()) or (in_text and before.isalnum() and after.isalpha()):
            kept.append(" ")
    return kept


def _written(tokens: Sequence[str], depth: int) -> list[str]:
    if depth > MAX_DEPTH:
        raise UnreadableLatexError(f"it is nested over {MAX_DEPTH} deep")
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
            index = _closing_bracket(tokens, place)
            written += ["[", *_written(tokens[place + 1 : index], depth + 1), "]"]
            place = index + 1
        for _ in range(_ARGUMENTS.get(token, 0)):
            argument, place = _argument(tokens, place, depth, token)
            if written[-2:] == [r"\log", "_"]:  # \log_2 3 and \log_23 are \log_{2}3, which no reader takes for base 23
                place += tokens[place : place + 1] == [" "]
                written += ["{", *argument, "}"]
            elif token in ("^", "_") and len(argument) == 1:
                written += argument
            else:
                written += ["{", *argument, "}"]
    return _primes(written)


def _group(tokens: Sequence[str], start: int, depth: int) -> tuple[list[str], int]:
    level, place = 1, start
    while place < len(tokens):
        level += (tokens[place] == "{") - (tokens[place] == "}")
        if level == 0:
            return _written(tokens[start:place], depth + 1), place + 1
        place += 1
    raise UnreadableLatexError("its braces do not match")


def _argument(tokens: Sequence[str], place: int, depth: int, command: str) -> tuple[list[str], int]:
    place += place < len(tokens) and tokens[place] == " "
    if place >= len(tokens) or tokens[place] == "}":
        raise UnreadableLatexError(f"{command} lacks an argument")
    if tokens[place] == "{":
        return _group(tokens, place + 1, depth)
    end = place + 1
    if command == "^":  # 10^12 is meant as 10^{12}, x^-1 as x^{-1}, though TeX reads one character
        end += tokens[place] in "+-" and end < len(tokens)
        while tokens[end - 1].isdigit() and end < len(tokens) and tokens[end].isdigit():
            end += 1
    elif tokens[place] in _ARGUMENTS and depth < MAX_DEPTH:  # \frac\sqrt3 2
        inner: list[str] = [tokens[place]]
        for _ in range(_ARGUMENTS[tokens[place]]):
            argument, end = _argument(tokens, end, depth + 1, tokens[place])
            inner += ["{", *argument, "}"]
        return inner, end
    return list(tokens[place:end]), end


def _closing_bracket(tokens: Sequence[str], start: int) -> int:
    for place in range(start, min(len(tokens), start + 40)):
        if tokens[place] == "]":
            return place
    raise UnreadableLatexError("its brackets do not match")


def _primes(tokens: Sequence[str]) -> list[str]:
    """`^'` as `'`."""
    kept: list[str] = []
    for token in tokens:
        if token == "'" and kept and kept[-1] == "^":
            kept.pop()
        kept.append(token)
    return kept


def _joined(tokens: Sequence[str]) -> str:
    """The tokens as text, with a space only where a command would run into a letter."""
    pieces: list[str] = []
    for token in tokens:
        if pieces and token[0].isalpha() and re.fullmatch(r"\\[A-Za-z]+", pieces[-1]):
            pieces.append(" ")
        pieces.append(token)
    return "".join(pieces)
