r"""Plain numbers as people and models write them: `58,500`, `-\frac{3}{4}`, `1\frac{4}{5}`, `3 1/4`, `67\%`,
`8.7\times10^{8}`, `0.\overline{3}`.

Reading them here is exact, and a thousand times faster than computer algebra. LaTeX readers take `4.5e33` for 4.5 times
Euler's number times 33.

Decimals without an end are `0.\overline{42}`, `0.\dot{4}\dot{2}`, `0.(42)`, `0.4242\ldots` and
`0.3\text{repeating}`. Dots after the digits count as repetition only if it is visible: one digit three times, or
several digits twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 10_000)
MAX_DIGITS = 1_500
MAX_EXPONENT = 400
MAX_REPEATING = 60

_DECIMAL = r"(?:\d{1,3}(?:(?:,|\{,\}|[ ])\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)
    (?: (?P<mantissa>{_DECIMAL})(?:[eE]|(?:\\times|\\cdot|\*)10\^)
        (?P<braced>\{{)?(?P<exponent>[-+]?\d{{1,4}})(?(braced)\}})
      | 10\^(?P<braced2>\{{)?(?P<power>[-+]?\d{{1,4}})(?(braced2)\}})
      | (?P<whole>\d+)?\\frac\{{(?P<top>-?\d+)\}}\{{(?P<bottom>-?\d+)\}}
      | (?:(?P<units>\d+)[ ])?(?P<over>\d+)/(?P<under>\d+)
      | (?P<decimal>{_DECIMAL})
    )(?P<percent>\\?%)?""",
    re.VERBOSE | re.ASCII,
)
_BLOCK = re.compile(
    r"""(?P<whole>\d*)\.(?P<fixed>\d*)
    (?: \\overline\{(?P<barred>\d+)\} | \((?P<bracketed>\d+)\) | 
        \\dot\{(?P<first>\d)\}(?:(?P<middle>\d*)\\dot\{(?P<last>\d)\})?
      | (?P<open>\\ldots) | (?P<word>\\text\{(?:repeating|recurring)\}|repeating|recurring) )""",
    re.VERBOSE | re.ASCII,
)
_INSIDE = re.compile(r"\d*\.\d*\\overline\{\d+\}", re.ASCII)
_OPEN_END = re.compile(r"(-?\d*\.\d+)\\ldots(.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class PlainNumber:
    """A number without symbols.

    Args:
        value: Exact value as written, without regard to a percent sign.
        half_unit: Half a unit of the last written digit of a decimal or scientific number; 0 for an exact number,
            which is a whole number, a fraction or a power of ten.
        percent: Whether a percent sign follows.
    """

    value: Fraction
    half_unit: Fraction = Fraction(0)
    percent: bool = False

    @property
    def meaning(self) -> Fraction:
        """The value, divided by 100 if a percent sign follows."""
        return self.value / 100 if self.percent else self.value

    def is_met_by(self, value: Fraction) -> bool:
        """Returns whether an answer with this value is correct for this gold.

        An exact gold needs the exact value. A decimal or scientific gold allows half a unit of its last digit, but at
        most 1 in 10,000: 9.6 is met by 9.6004, but not by 9.64; 1234.56 by 1234.564, but not by 1234.57.
        """
        return abs(self.value - value) <= min(self.half_unit, abs(self.value) * RELATIVE_TOLERANCE)


def read_number(text: str) -> PlainNumber | None:
    """Reads a canonical text that is a number as a whole; None for any other text."""
    if len(text) > MAX_DIGITS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return _repeating_number(text) if "." in text else None
    sign = -1 if match["sign"] == "-" else 1
    percent = match["percent"] is not None
    if match["top"] is not None or match["over"] is not None:
        top, bottom = int(match["top"] or match["over"]), int(match["bottom"] or match["under"])
        whole = int(match["whole"] or match["units"] or 0)
        if bottom == 0 or (match["whole"] is not None and (top < 0 or bottom < 0)):
            return None
        if match["units"] is not None and top >= bottom:  # 3 5/4 is not a mixed number
            return None
        return PlainNumber(sign * (whole + Fraction(top, bottom)), percent=percent)
    exponent = int(match["exponent"] or match["power"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    written = re.sub(r"[,{} ]", "", match["mantissa"] or match["decimal"] or "1")
    scale = Fraction(10) ** exponent
    half_unit = Fraction(0)
    if match["mantissa"] is not None or "." in written:
        half_unit = scale / (2 * 10 ** len(written.partition(".")[2]))
    return PlainNumber(sign * Fraction(written) * scale, half_unit, percent)


def _repeating_number(text: str) -> PlainNumber | None:
    body, percent = re.subn(r"\\?%$", "", text)
    value = repeating_value(body.lstrip("+-")) if body.lstrip("+-")[:1] in ".0123456789" else None
    if value is None or len(body) - len(body.lstrip("+-")) > 1:
        return None
    return PlainNumber(-value if body.startswith("-") else value, percent=bool(percent))


def numbers_agree(gold: PlainNumber, answer: PlainNumber) -> bool:
    r"""Returns whether the answer is correct. If only one has a percent sign, `67\%` agrees with 67 and with 0.67."""
    if gold.is_met_by(answer.value):
        return True
    if gold.percent == answer.percent:
        return False
    # The gold 67% is met by 0.67, the gold 0.67 by 67%.
    return gold.is_met_by(answer.value * 100 if gold.percent else answer.meaning)


def repeating_value(text: str) -> Fraction | None:
    """Returns the value of an unsigned canonical text that is a repeating decimal as a whole, or None."""
    if len(text) > MAX_REPEATING + 40:
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
    if not block or len(fixed + block) > MAX_REPEATING:
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
