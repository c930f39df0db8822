r"""Values with an approximation: `\frac{2}{3}\approx0.667`, `x\approx40.2`, `\text{about }40.2`."""

from __future__ import annotations

import re

from popo_lightning.verifiers.equality.latex import parts
from popo_lightning.verifiers.equality.names import assignment

MAX_SIDES = 4

_ABOUT = r"(?<![A-Za-z\\])(?:is)?(?:approximately|approx\.?|about|roughly|around)(?![A-Za-z])"
_IN_TEXT = re.compile(rf"\\text\{{{_ABOUT} ?([^{{}}]*\d[^{{}}]*)\}}(.*)", re.DOTALL)
_BEFORE = re.compile(rf"(?:\\text\{{\(?{_ABOUT}\)?\}}|{_ABOUT}|\\sim ?)(?=[-+\d.\\$€£(])")
_AFTER = re.compile(rf"(?<=[\d}}%)]) ?(?:\\text\{{\(?{_ABOUT}\)?\}}|\({_ABOUT}\)|{_ABOUT})")
_SIGNS = re.compile(r"\\(?:approx|sim|text)|ppro|about|roughly|around")


def approximated(text: str) -> list[str] | None:
    r"""Returns the sides of `\approx` with their names, or the one value called approximate; None for other text."""
    if not _SIGNS.search(text):
        return None
    plain = _IN_TEXT.sub(r"\\text{\1}\2", text) if _IN_TEXT.fullmatch(text) else text
    plain = _AFTER.sub("", _BEFORE.sub("", plain, count=1), count=1)
    sides = parts(plain, r"\\approx") if r"\approx" in plain else [plain]
    if len(sides) > 1 and not sides[0]:
        sides = sides[1:]
    if len(sides) > 1 and assignment(f"{sides[0]}=0")[0] is not None:
        sides = [f"{sides[0]}={sides[1]}", *sides[2:]]
    if sides == [text] or not all(sides) or len(sides) > MAX_SIDES:
        return None
    return sides
