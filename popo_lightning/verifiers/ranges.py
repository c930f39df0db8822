r"""Inequalities of one name as intervals: `x>2` as `(2,\infty)`, `1\leq x\leq3` as `[1,3]`."""

from __future__ import annotations

import re

from popo_lightning.verifiers.latex import parts, without_commands

_SIGN = r"<|>|\\leq|\\geq"
_NAME = re.compile(r"[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega|rho)")


def interval_of(text: str) -> tuple[str, str] | None:
    r"""(name, interval) of canonical `x<b`, `a>x`, `a<x\leq b`, `b>x>a`; None for any other text."""
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
    if re.search(r"[A-Za-z]", without_commands(sides[0] + sides[2])) or len({_rises(sign) for sign in signs}) != 1:
        return None
    if not _rises(signs[0]):
        sides, signs = sides[::-1], signs[::-1]
    left = ("[" if "q" in signs[0] else "(") + sides[0] if sides[0] else r"(-\infty"
    right = sides[2] + ("]" if "q" in signs[1] else ")") if sides[2] else r"\infty)"
    return sides[1], f"{left},{right}"


def _rises(sign: str) -> bool:
    return sign in ("<", r"\leq")
