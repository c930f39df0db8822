r"""What a value is counted or measured in: `12 ft`, `12\text{ apples}`, `90^\circ`, `70\text{ thousand dollars}`.

A word after a number may as well change it (`12\text{ squared}`) or deny it (`12\text{ is impossible}`), so that only
known units are taken for units, and inside `\text{...}` also things: words of three letters and more that are not
among those that change or deny. Hundred to trillion and dozen multiply the number.
"""

from __future__ import annotations

import re

from popo_lightning.verifiers.numbers import read_number

MAX_WORDS = 7
"""A longer remark on a number is no unit."""

_SYNONYMS = """
m meter metre; cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre; in inch; ft foot feet;
yd yard; mi mile; s sec second; min minute; h hr hour; day; week wk; month; year yr; ms millisecond; g gram;
kg kilogram; mg milligram; lb pound; oz ounce; ton tonne; dollar usd; cent; euro; penny pennies; degree deg; rad radian;
unit; l liter litre L; ml milliliter millilitre; gallon gal; acre; mph; am; pm; hz hertz; khz; mhz; J joule; N newton;
W watt; V volt; kelvin; mol mole; pa pascal; ev; erg; mb megabyte; square sq; cubic cu; per
"""
_UNITS = {name: names.split()[0] for names in _SYNONYMS.split(";") for name in names.split()}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWERS = {"square": "^2", "squared": "^2", "cubic": "^3", "cubed": "^3"}
_CHANGING = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety once twice thrice double triple first third fourth fifth
sixth seventh eighth ninth tenth hundredth thousandth millionth half halves quarter couple score gross grand quadrillion
mil mill bil bill thou percent percentage and nor not but either neither none never nothing any all some for are was
were has have had can cannot may might must should would could will the then than that this which what where when while
until unless except without below above under over more less fewer greater larger smaller most least about approximately
around roughly almost nearly exactly only just maybe perhaps possible impossible possibly probably undefined unknown
infinite infinity invalid valid wrong incorrect correct true false yes negative opposite inverse reciprocal minus plus
times divided multiplied added subtracted sum difference product quotient remainder power squared cubed square cube
factorial choose permute mod modulo base binary octal decimal hexadecimal ratio log sqrt sin cos tan sec csc cot exp lim
sup inf max det gcd lcm arg prime other another per cubic nan null etc equal
"""
_NO_THINGS = frozenset(_CHANGING.split())
_BARE_SHORT = "Hz cm mm km kg ft mi in lb"  # two other letters are a product
_BARE_NAMES = "|".join(
    [*sorted((f"{n}(?:es|s)?" for n in _UNITS if len(n) > 2), key=len, reverse=True), *_BARE_SHORT.split()]
)
_BARE = re.compile(
    rf"({'|'.join(_SCALES)})?(square|sq|cubic)?(?:({_BARE_NAMES})(?:(\^[23])|(?:per|(/))({_BARE_NAMES}|[sh]))?|(m)(/)(s))?\.?"
    "|(percent)"
)
_MEASURED = re.compile(
    r"(?P<value>.*(?:[\d})]|\\pi))(?:(?P<degrees>\^\\circ) ?(?:[CF]|\\text\{(?:[CF]|Celsius|Fahrenheit)\})?"
    r"|(?P<text>(?:\\text\{[A-Za-z ./^23-]*\}(?:\^\{?-?\d\}?|/)*)+)"
    r"| ?(?P<bare>[A-Za-z][A-Za-z/]*(?:\^[23])?\.?))",
    re.ASCII | re.DOTALL,
)
_ALL_IN_TEXT = re.compile(r"\\text\{(-?\d[\d.,]*) ?([A-Za-z][A-Za-z ./^23]*)\}", re.ASCII)


def split_unit(text: str) -> tuple[str, str]:
    """(value, unit) of canonical LaTeX; the text itself and no unit where what follows the value is none."""
    match = _MEASURED.fullmatch(_ALL_IN_TEXT.sub(r"\1\\text{\2}", text) if text.startswith(r"\text{") else text)
    if match is None:
        return text, ""
    if match["degrees"] is not None:
        return match["value"], "degree" + "".join(re.findall("[CF]", text[match.end("degrees") :]))
    words = _words_in_text(match["text"]) if match["text"] is not None else _bare_words(match["bare"])
    if len(words) > MAX_WORDS:
        return text, ""
    if words == ["percent"]:
        return match["value"] + "%", ""
    value = match["value"]
    while words and words[0].casefold() in _SCALES:
        scaled = _scaled(value, _SCALES[words.pop(0).casefold()])
        if scaled is None:
            return text, ""
        value = scaled
        if not words:
            return value, ""
    unit = _unit(words)
    return (value, unit) if unit else (text, "")


def _words_in_text(text: str) -> list[str]:
    written = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("p.m", "pm").replace("a.m", "am")
    return re.findall(r"[A-Za-z]+|/|\^\{?-?\d\}?|[^ .]", written)


def _bare_words(text: str) -> list[str]:
    match = _BARE.fullmatch(text)
    return [word for word in match.groups() if word] if match else []


def _scaled(value: str, factor: int) -> str | None:
    number = read_number(value)
    if number is None or number.percent:
        return None
    exact = number.value * factor
    return str(exact) if exact.denominator == 1 else rf"\frac{{{exact.numerator}}}{{{exact.denominator}}}"


def _unit(words: list[str]) -> str:
    """One name for all spellings of a unit or thing; empty where the words are neither."""
    names: list[str] = []
    power = ""
    for word in words:
        name = _known(word)
        if name in ("square", "cubic"):
            power = _POWERS[name]
        elif word in _POWERS and names and names[-1] in _UNITS.values():
            names[-1] += _POWERS[word]
        elif re.fullmatch(r"\^\{?-?\d\}?", word) and names:
            names[-1] += word.replace("{", "").replace("}", "")
        elif word in ("/", "per"):
            names.append("/")
        elif name or _is_thing(word):
            names.append((name or _singular(word.casefold())) + power)
            power = ""
        else:
            return ""
    if names and names[0].startswith("unit"):
        return "unit"
    return "".join(names).strip("/").replace("mph", "mi/h")


def _known(word: str) -> str | None:
    if word in _UNITS or len(word) == 1:
        return _UNITS.get(word)
    small = word.casefold()
    return _UNITS.get(small) or _UNITS.get(_singular(small))


def _is_thing(word: str) -> bool:
    small = word.casefold()
    return len(word) > 2 and word.isalpha() and not {small, _singular(small)} & (_NO_THINGS | set(_SCALES))


def _singular(word: str) -> str:
    return re.sub(r"(?<=ch)es$|(?<=[a-z])s$", "", word)
