r"""Names of values: `x=5`, `m\angle 3=72`, `k\in\{4,5\}`, `x=1,y=2` for a pair."""

from __future__ import annotations

import re

from popo_lightning.verifiers.equality.latex import brackets, has_letters, parts

_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma|tau|angle)"
_CORNERS = rf"(?:[A-Z]{{1,4}}|[a-z]|\d{{1,3}}|{_GREEK})"
_FIGURE = (
    rf"m?(?:\\(?:angle|triangle|odot)(?: ?{_CORNERS}|\{{[A-Z]{{2,4}}\}})|\\(?:overline|widehat)\{{[A-Za-z]{{1,3}}'?\}}"
    r"|\\(?:vec|overrightarrow|overleftrightarrow)(?:\{[A-Za-z]{1,2}\}| ?[A-Za-z])"
    r"|\|(?:[A-Z]{2}|\\overline\{[A-Z]{2}\})\||\[[A-Z]{3,5}\])"
)
_WORDS = r"(?i:area|perimeter|volume|circumference|length|width|height|radius|diameter|distance|answer)"
_NAME = re.compile(
    rf"(?:\\text\{{[A-Za-z ]+\}}(?:{_FIGURE}|[A-Z]{{2,4}})?|m?(?:\\angle ?)?[A-Za-z]{{1,3}}|{_GREEK}"
    rf"|{_FIGURE}|{_WORDS})"
    rf"(?:\d{{1,3}})?(?:_(?:\w|\{{\w{{1,8}}\}}|\{{\\triangle ?[A-Z]{{3}}\}}))?'*(?:\((?:[A-Za-z],?){{1,4}}\))?",
    re.ASCII,
)
_RATIO = re.compile(rf"\\(?:sin|cos|tan|cot|sec|csc) ?(?:\(?(?:m?\\angle ?{_CORNERS}|[A-Z]{{1,3}}|[a-z]|{_GREEK})\)?)")
_SHORT = re.compile(rf"[A-Za-z]|{_GREEK}")
_LINE = re.compile(r"\|?\\overline\{(\w+)\}\|?|\|(\w+)\||(?<=\\angle)\{(\w+)\}")


def assignment(text: str) -> tuple[str | None, str]:
    r"""Returns (name, value) of `x=5`, `7=x` and `x\in[0,1]`; (None, text) for anything else."""
    for sign in ("=", r"\\in"):
        sides = parts(text, sign) if sign.strip("\\") in text else []
        if sign == "=" and len(sides) > 2 and all(map(_NAME.fullmatch, sides[:-1])) and not has_letters(sides[-1]):
            sides = [sides[0], sides[-1]]  # AB=BC=5
        if len(sides) != 2 or not all(sides):
            continue
        if _names(*sides) or _names_a_tuple(*sides):
            return _one_name(sides[0]), sides[1]
        if sign == "=" and (_SHORT.fullmatch(sides[1]) or _RATIO.fullmatch(sides[1])) and not has_letters(sides[0]):
            return _one_name(sides[1]), sides[0]
    return None, text


def named_set(text: str) -> tuple[str | None, str] | None:
    r"""Returns (name, set) of `k\in\{4,5\}`, `S=\{0,1\}` and a set without a name; None for anything else."""
    name, value = assignment(text)
    inner = brackets(value)
    return (name, value) if inner is not None and inner[0] == r"\{" else None


def named_values(elements: list[str]) -> tuple[list[str], str] | None:
    r"""Returns (names, tuple) of the list `x=1,y=2`; None if an element has no name or two have the same.

    The values of consecutive letters are in alphabetical order, other values in the order written.
    """
    read = [assignment(element) for element in elements]
    names = [name for name, _ in read if name is not None]
    if len(names) < len(elements) or len(set(names)) < len(names) or len(names) < 2:
        return None
    if any(r"\in" in element and "=" not in element for element in elements):
        return None
    letters = "".join(sorted(names))
    if letters.isalpha() and len(letters) == len(names) and ord(letters[-1]) - ord(letters[0]) == len(names) - 1:
        read.sort(key=lambda pair: str(pair[0]))
    return [str(name) for name, _ in read], "(" + ",".join(value for _, value in read) + ")"


def of_one_letter(named: list[str]) -> bool:
    """Returns whether the names are those of one variable, as in `x_1=1,x_2=2`."""
    return len({element[:1] for element in named}) == 1


def tuple_names(text: str) -> list[tuple[str, str]]:
    """Returns (name, value) of each element of `(x,y)=(1,2)`; none for anything else."""
    names, value = assignment(text)
    inner, named = brackets(value), brackets(names or "")
    if inner is None or named is None:
        return []
    return list(zip(named[1].split(","), parts(inner[1], ","), strict=False))


def _names(name: str, value: str) -> bool:
    if _NAME.fullmatch(name):
        return True
    return _RATIO.fullmatch(name) is not None and not has_letters(value) and not re.search(_GREEK, value)


def _names_a_tuple(names: str, values: str) -> bool:
    """Returns whether the text before the sign of `(x,y)=(2,3)` names each value after it."""
    inner = brackets(values)
    named = re.fullmatch(r"\([A-Za-z](?:,[A-Za-z]){1,4}\)", names)
    return named is not None and inner is not None and names.count(",") == len(parts(inner[1], ",")) - 1


def _one_name(name: str) -> str:
    r"""Unifies `BC`, `|BC|` and `\overline{BC}`, and `m\angle 3` and `\angle 3`."""
    name = name.replace(" ", "")
    return _LINE.sub(lambda line: line[1] or line[2] or line[3], re.sub(r"^m(?=\\)", "", name))
