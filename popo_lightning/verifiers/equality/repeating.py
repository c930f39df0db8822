r"""Decimals without an end: `0.\overline{42}`, `0.\dot{4}\dot{2}`, `0.(42)`, `0.4242\ldots`, `0.3\text{repeating}`.

Dots after the digits count as repetition only if it is visible: one digit three times, or several digits twice.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_DIGITS = 60

_BLOCK = re.compile(
    r"""(?P<whole>\d*)\.(?P<fixed>\d*)
    (?: \\overline\{(?P<barred>\d+)\} | \((?P<bracketed>\d+)\) | 
        \\dot\{(?P<first>\d)\}(?:(?P<middle>\d*)\\dot\{(?P<last>\d)\})?
      | (?P<open>\\ldots) | (?P<word>\\text\{(?:repeating|recurring)\}|repeating|recurring) )""",
    re.VERBOSE | re.ASCII,
)
_INSIDE = re.compile(r"\d*\.\d*\\overline\{\d+\}", re.ASCII)
_OPEN_END = re.compile(r"(-?\d*\.\d+)\\ldots(.*)", re.ASCII | re.DOTALL)


def repeating_value(text: str) -> Fraction | None:
    """Returns the value of an unsigned canonical text that is a repeating decimal as a whole, or None."""
    if len(text) > MAX_DIGITS + 40:
        return None
    match = _BLOCK.fullmatch(text)
    if match is None:
        return None
    fixed, block = match["fixed"], match["barred"] or match["bracketed"] or ""
    if match["first"]:
        block = match["first"] + (match["middle"] or "") + (match["last"] or "")
    elif match["open"]:
        fixed, block = _split(fixed)
    elif match["word"]:  # with several digits it is unclear which repeat
        fixed, block = "", fixed if len(fixed) == 1 else ""
    if not block or len(fixed + block) > MAX_DIGITS:
        return None
    nines = 10 ** len(block) - 1
    return Fraction(int(match["whole"] or 0)) + (int(fixed or 0) + Fraction(int(block), nines)) / 10 ** len(fixed)


def without_repeating(text: str) -> str:
    """Replaces each decimal under a bar by a fraction, for computer algebra."""
    return _INSIDE.sub(_fraction, text) if r"\overline" in text else text


def open_end(text: str) -> str | None:
    r"""Removes the dots of `1.414\ldots`, and keeps the text after them; None for any other text."""
    match = _OPEN_END.fullmatch(text) if r"\ldots" in text else None
    return match[1] + match[2] if match else None


def _split(digits: str) -> tuple[str, str]:
    """Splits digits into those before the shortest block that repeats at their end, and that block, if there is one."""
    for size in range(1, len(digits) // 2 + 1):
        block = digits[-size:]
        if digits.endswith(block * (3 if size == 1 else 2)):
            fixed = digits
            while fixed.endswith(block):
                fixed = fixed[:-size]
            return fixed, block
    return digits, ""


def _fraction(match: re.Match[str]) -> str:
    value = repeating_value(match[0])
    return match[0] if value is None else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
