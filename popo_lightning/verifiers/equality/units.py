r"""Units of values: `12 ft`, `\$12`, `12\text{ apples}`, `90^\circ`, `7\text{ million}`.

A word after a number may also change it (`12\text{ squared}`) or deny it (`12\text{ is impossible}`). So only known
units count as units, and inside `\text{...}` also things: words of at least three letters that are not listed as
changing or denying. Hundred to trillion, lakh, crore and dozen multiply the number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from popo_lightning.verifiers.equality.numbers import read_number
from popo_lightning.verifiers.equality.unit_names import (
    CURRENCIES,
    CURRENCY_CODES,
    CURRENCY_SIGNS,
    PERCENT,
    SCALES,
    UNITS,
    is_thing,
    known_unit,
    singular,
)

MAX_WORDS = 7
"""Maximum number of words after a number that count as a unit."""

_POWERS = {"square": 2, "squared": 2, "cubic": 3, "cubed": 3}
_BARE_SHORT = "Hz cm mm km kg ft mi in lb"  # any other two letters are a product
_BARE_NAMES = "|".join(
    [
        *sorted((f"{n}(?:es|s)?" for n in UNITS if len(n) > 2), key=len, reverse=True),
        *_BARE_SHORT.split(),
        *(code for code in CURRENCY_CODES if code.isupper()),
    ]
)
_BARE = re.compile(
    rf"({'|'.join(SCALES)})?(square|sq|cubic)?(?:({_BARE_NAMES})(?:(\^[23])|(?:per|(/))({_BARE_NAMES}|[sh]))?|(m)(/)(s))?\.?"
    "|(percent|pct)"
)
_TEXTS = r"(?:\\text\{(?:[A-Za-z ./^23-]|\^\{-?\d\}|\\cdot)*\}(?:\^\{?-?\d\}?|/|\\cdot ?)*)+"
_MEASURED = re.compile(
    r"(?P<value>.*?(?:[\d})]|\\pi))(?:(?P<degrees>\^\\circ) ?(?:[CF]|\\text\{(?:[CF]|Celsius|Fahrenheit)\})?"
    rf"|(?P<text>{_TEXTS})|\\frac\{{(?P<above>{_TEXTS})\}}\{{(?P<below>{_TEXTS})\}}"
    r"| ?(?P<bare>[A-Za-z][A-Za-z/]*(?:\^[23])?\.?))",
    re.ASCII | re.DOTALL,
)
_ALL_IN_TEXT = re.compile(r"\\text\{(-?\d[\d.,]*) ?([A-Za-z][A-Za-z ./^23]*)\}", re.ASCII)
_OHM = re.compile(r"(?<=[\d}])(?:\\text\{([kMGm])\}|([kMGm]))?\\Omega")
_MICRO = re.compile(r"(?<=[\d}])\\mu ?\\text\{")
_SIGN = re.compile("|".join(["(?:US)?" + re.escape(r"\$"), *(sign for sign in CURRENCY_SIGNS if len(sign) == 1)]))
_CODE = re.compile(rf"(?:\\text\{{)?({'|'.join(CURRENCY_CODES)})\.?\}}?(?=[-+]?(?:[\d.]|\\frac))")
_MINUTES = re.compile(r"(-?)(\d{1,4})\^\\circ ?(\d{1,2}(?:\.\d{1,6})?)'(?:(\d{1,2}(?:\.\d{1,6})?)(?:''|\"))?", re.ASCII)
_ORDINAL = re.compile(r"(\d{1,9})\^?\{?(?:\\text\{)?(st|nd|rd|th)\}{0,2}", re.ASCII)
_ENDINGS = {"1": "st", "2": "nd", "3": "rd"}


def split_unit(text: str) -> tuple[str, str]:
    """Returns (value, unit) of canonical LaTeX; (text, "") if no unit follows the value."""
    bare, currency = _without_currency(text)
    value, unit = _split(bare)
    if not currency:
        return value, unit
    if unit.partition("/")[0] in CURRENCIES:
        return (value, unit) if unit.partition("/")[0] == currency else (text, "")
    return value, f"{currency}/{unit}" if unit else currency


def _without_currency(text: str) -> tuple[str, str]:
    """Removes currency signs and returns the currency; the text does not change if there is none or several."""
    code = _CODE.match(text)
    if code is not None:
        return text[code.end() :], CURRENCY_CODES[code[1]]
    found = {CURRENCY_SIGNS[sign.removeprefix("US")] for sign in _SIGN.findall(text)}
    return (_SIGN.sub("", text).replace(r"\text{}", ""), found.pop()) if len(found) == 1 else (text, "")


def _split(text: str) -> tuple[str, str]:
    exact = _minutes(text) or _ordinal(text)
    if exact:
        return exact
    written = _ALL_IN_TEXT.sub(r"\1\\text{\2}", text) if text.startswith(r"\text{") else text
    if "\\" in written:
        written = _MICRO.sub(r"\\text{u", _OHM.sub(lambda ohm: rf"\text{{{ohm[1] or ohm[2] or ''}ohm}}", written))
    match = _MEASURED.fullmatch(written)
    if match is None:
        return text, ""
    if match["degrees"] is not None:
        return match["value"], "degree" + "".join(re.findall("[CF]", text[match.end("degrees") :]))
    words = _words(match)
    if len(words) > MAX_WORDS:
        return text, ""
    value = match["value"]
    if words in PERCENT:
        return value + "%", ""
    while words and words[0].casefold() in SCALES:
        scaled = _scaled(value, SCALES[words.pop(0).casefold()])
        if scaled is None:
            return text, ""
        value = scaled
        if not words:
            return value, ""
    unit = _unit(words)
    return (value, unit) if unit else (text, "")


def _minutes(text: str) -> tuple[str, str] | None:
    """Converts degrees, minutes and seconds to degrees."""
    match = _MINUTES.fullmatch(text) if "'" in text else None
    if match is None or float(match[3]) >= 60 or float(match[4] or 0) >= 60:
        return None
    value = int(match[2]) + Fraction(match[3]) / 60 + Fraction(match[4] or 0) / 3600
    return _written(-value if match[1] else value), "degree"


def _ordinal(text: str) -> tuple[str, str] | None:
    match = _ORDINAL.fullmatch(text)
    if match is None or text.count("{") != text.count("}"):
        return None
    ending = "th" if match[1][-2:-1] == "1" else _ENDINGS.get(match[1][-1], "th")
    return (match[1], "ordinal") if match[2] == ending else None


def _words(match: re.Match[str]) -> list[str]:
    if match["text"] is not None:
        return _words_in_text(match["text"])
    if match["bare"] is not None:
        return _bare_words(match["bare"])
    below = [f"/ {word}" if word[0].isalpha() else word for word in _words_in_text(match["below"])]
    return [*_words_in_text(match["above"]), *" ".join(below).split()]


def _words_in_text(text: str) -> list[str]:
    text = re.sub(r"\^\{(-?\d)\}", r"^\1", text.replace(r"\cdot", " "))
    written = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("p.m", "pm").replace("a.m", "am")
    return re.findall(r"[A-Za-z]+|/|\^-?\d|[^ .]", written)


def _bare_words(text: str) -> list[str]:
    match = _BARE.fullmatch(text)
    return [word for word in match.groups() if word] if match else []


def _scaled(value: str, factor: int) -> str | None:
    number = read_number(value)
    return None if number is None or number.percent else _written(number.value * factor)


def _written(exact: Fraction) -> str:
    if exact.denominator == 1:
        return str(exact)
    sign = "-" if exact < 0 else ""
    return rf"{sign}\frac{{{abs(exact.numerator)}}}{{{exact.denominator}}}"


def _unit(words: list[str]) -> str:
    """Returns one name for all spellings of a unit or thing; empty if the words are neither."""
    factors: list[_Factor] = []
    power, below, all_known = 1, False, True
    for word in words:
        name = known_unit(word)
        if name in ("square", "cubic"):
            power = _POWERS[name]
        elif word in _POWERS and factors and factors[-1].name in UNITS.values():
            factors[-1].power = _POWERS[word]
        elif re.fullmatch(r"\^-?\d", word) and factors:
            factors[-1].power = abs(int(word[1:]))
            factors[-1].below ^= word[1] == "-"
        elif word in ("/", "per"):
            below = True
        elif name or is_thing(word, alone=len(words) == 1):
            factors.append(_Factor(name or singular(word.casefold()), power, below))
            power, below, all_known = 1, False, all_known and name is not None
        else:
            return ""
    if factors and factors[0].name == "unit":
        return "unit"
    above = [str(factor) for factor in factors if not factor.below]
    names = "".join(sorted(above) if all_known else above) + "".join(f"/{f}" for f in factors if f.below)
    return names.strip("/").replace("mph", "mi/h")


@dataclass
class _Factor:
    """A unit in a product of units."""

    name: str
    power: int
    below: bool

    def __str__(self) -> str:
        return self.name if self.power == 1 else f"{self.name}^{self.power}"
