r"""Parts of the real line: `x>2` as `(2,\infty)`, `x<0\text{ or }x=1` as `(-\infty,0)` and `\{1\}`, all of it."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from popo_lightning.verifiers.equality.latex import brackets, has_letters, parts, without_commands
from popo_lightning.verifiers.equality.numbers import read_number

MAX_PIECES = 12

_SIGN = r"<|>|\\leq|\\geq"
_NAME = re.compile(r"[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega|rho)")
_OR = re.compile(r"\\text\{(?:or|OR)\}|\\lor ?|\\cup ?|(?<=[\d})\]])or(?=[-+\dA-Za-z\\({\[])")
_AND = re.compile(r"\\text\{(?:and|AND)\}|\\land ?|(?<=[\d})])and(?=[-+\dA-Za-z\\])")
_WHOLE = re.compile(r"\\mathbb ?R|\(-\\infty,\+?\\infty\)|\\text\{(?:all )?(?:real numbers|reals)\}")
_WORTH_IT = re.compile(r"[<>]|\\(?:leq|geq|neq|mathbb|infty|text\{(?:all|real))")
_EVERYTHING = r"(-\infty,\infty)"


class Region(NamedTuple):
    """A union of intervals.

    Args:
        name: Name of the variable, or None.
        pieces: The intervals and sets in canonical LaTeX, in any order.
        plain: Whether the text was written as intervals and sets.
    """

    name: str | None
    pieces: tuple[str, ...]
    plain: bool


def region_of(text: str) -> Region | None:
    r"""Reads a canonical text such as `x<-1\text{or}x>3`, `x\in\mathbb R` or `(1,2)\cup\{3\}`; None for others."""
    if not _WORTH_IT.search(text) and brackets(text.partition(r"\cup")[0]) is None:
        return None
    built = _built(text)
    if built is not None:
        return built
    name, rest = _membership(text)
    found = [_piece(piece) for piece in _OR.split(rest)]
    known = [region for region in found if region is not None]
    names = {region.name for region in known} - {None} | ({name} if name else set())
    pieces = tuple(piece for region in known for piece in region.pieces)
    if len(known) < len(found) or len(names) > 1 or len(pieces) > MAX_PIECES:
        return None
    if len(pieces) == 1 and pieces[0].startswith(r"\{"):  # a list, not a region
        return None
    return Region(names.pop() if names else None, pieces, all(region.plain for region in known))


def interval_of(text: str) -> tuple[str, str] | None:
    r"""Returns (name, interval) of canonical `x<b`, `a>x`, `a<x\leq b`, `b>x>a`; None for any other text."""
    sides = parts(text, _SIGN)
    signs = re.findall(_SIGN, text)
    if len(sides) - len(signs) != 1 or not all(sides) or "=" in text:
        return None
    if len(sides) == 2 and _NAME.fullmatch(sides[1]):
        sides.append("")
    elif len(sides) == 2:
        sides.insert(0, "")
    if len(sides) != 3 or not _NAME.fullmatch(sides[1]):
        return None
    if len(signs) == 1:
        signs = signs * 2
    if has_letters(sides[0] + sides[2]) or len({_rises(sign) for sign in signs}) != 1:
        return None
    if not _rises(signs[0]):
        sides, signs = sides[::-1], signs[::-1]
    left = ("[" if "q" in signs[0] else "(") + sides[0] if sides[0] else r"(-\infty"
    right = sides[2] + ("]" if "q" in signs[1] else ")") if sides[2] else r"\infty)"
    return sides[1], f"{left},{right}"


def _rises(sign: str) -> bool:
    return sign in ("<", r"\leq")


def _membership(text: str) -> tuple[str | None, str]:
    sides = parts(text, r"\\in")
    return (sides[0], sides[1]) if len(sides) == 2 and _NAME.fullmatch(sides[0]) else (None, text)


def _built(text: str) -> Region | None:
    r"""Reads `\{x|2<x<3\}` as the condition on x."""
    inner = brackets(text)
    sides = parts(inner[1], r"\||:") if inner is not None and inner[0] == r"\{" else []
    if len(sides) != 2:
        return None
    name, domain = _membership(sides[0])
    if not _NAME.fullmatch(name or sides[0]) or (name and not _WHOLE.fullmatch(domain)):
        return None
    read = region_of(sides[1]) if not sides[1].startswith(r"\{") else None
    return read if read is not None and read.name == (name or sides[0]) else None


def _piece(text: str) -> Region | None:
    if _WHOLE.fullmatch(text):
        return Region(None, (_EVERYTHING,), False)
    read = interval_of(text)
    if read is not None:
        return Region(read[0], (read[1],), False)
    inner = brackets(text)
    if inner is not None:
        is_set, count = inner[0] == r"\{", len(parts(inner[1], ","))
        ordered = inner[0] in "([" and inner[2] in ")]" and count == 2
        if is_set and inner[1]:
            return Region(None, tuple(rf"\{{{point}\}}" for point in parts(inner[1], ",")), True)
        return Region(None, (text,), True) if ordered else None
    return _between(text) or _without_points(text) or _point(text)


def _between(text: str) -> Region | None:
    r"""Reads `x>1\text{and}x<4` as `(1,4)`."""
    sides = [interval_of(part) for part in _AND.split(text)]
    if len(sides) != 2 or sides[0] is None or sides[1] is None or sides[0][0] != sides[1][0]:
        return None
    lower, upper = sorted((sides[0][1], sides[1][1]), key=lambda interval: interval.startswith(r"(-\infty,"))
    if lower.startswith(r"(-\infty,") or not lower.endswith(r",\infty)") or not upper.startswith(r"(-\infty,"):
        return None
    return Region(sides[0][0], (lower.removesuffix(r"\infty)") + upper.removeprefix(r"(-\infty,"),), False)


def _without_points(text: str) -> Region | None:
    r"""Reads `x\neq2` and `\mathbb R\setminus\{2\}` as two intervals."""
    sides = parts(text, r"\\neq")
    if len(sides) == 2 and _NAME.fullmatch(sides[0]):
        name, points = sides[0], parts(sides[1], ",")
    else:
        sides = parts(text, r"\\setminus|-") if text.startswith(r"\mathbb") else parts(text, r"\\setminus")
        inner = brackets(sides[-1])
        if len(sides) != 2 or not _WHOLE.fullmatch(sides[0]) or inner is None or inner[0] != r"\{":
            return None
        name, points = None, parts(inner[1], ",")
    points = [part.replace(r"\pm", sign) for part in points for sign in ("-+" if part.startswith(r"\pm") else "-")]
    points = [point.strip().removeprefix("+") for point in points]
    if not all(points) or re.search(r"[A-Za-z=<>]", without_commands("".join(points))):
        return None
    if len(points) > 1:
        numbers = {point: read_number(point) for point in points}
        if None in numbers.values():
            return None
        points = sorted(numbers, key=lambda point: numbers[point].value)  # type: ignore[union-attr]
    ends = [r"-\infty", *points, r"\infty"]
    return Region(name, tuple(f"({a},{b})" for a, b in pairwise(ends)), False)


def _point(text: str) -> Region | None:
    sides = parts(text, "=")
    if len(sides) != 2 or not _NAME.fullmatch(sides[0]) or has_letters(sides[1]):
        return None
    return Region(sides[0], (rf"\{{{sides[1]}\}}",), False) if sides[1] else None
