"""Words after a number: units with one name each, currencies, scales, and words that change or deny the number."""

from __future__ import annotations

import re
from itertools import product

_SYNONYMS = """
m meter metre; cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre; in inch; ft foot feet;
yd yard; mi mile; s sec second; min minute; h hr hour; day; week wk; month; year yr; ms millisecond; g gram;
kg kilogram; mg milligram; lb; pound; oz ounce; ton tonne; dollar usd; cent; euro eur; gbp; rupee inr; yen jpy;
yuan cny rmb; penny pennies; degree deg; rad radian; unit; l liter litre L; ml milliliter millilitre; gallon gal; acre;
mph; am; pm; hz hertz; khz; mhz; J joule; N newton; W watt; V volt; ohm; ampere amp; coulomb; farad; tesla; kelvin;
mol mole; pa pascal; ev; erg; calorie cal; mb megabyte; square sq; cubic cu; per
"""
UNITS = {name: names.split()[0] for names in _SYNONYMS.split(";") for name in names.split()}
_PREFIXED = {
    prefix + base
    for prefix, base in product("kMGmun", ["m", "g", "s", "A", "Hz", "N", "Pa", "J", "W", "V", "F", "ohm"])
} | {"keV", "MeV", "GeV", "eV", "Pa", "kcal", "mmol", "kmol", "kWh", "Wh"}  # fmt: skip

SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "lakh": 10**5, "crore": 10**7,
}  # fmt: skip

CURRENCY_SIGNS = {
    r"\$": "dollar", "€": "euro", "£": "gbp", "₹": "rupee", "¥": "yen", "¢": "cent", "₩": "krw", "₽": "rub",
}  # fmt: skip
CURRENCY_CODES = {
    "USD": "dollar", "EUR": "euro", "GBP": "gbp", "INR": "rupee", "Rs": "rupee", "JPY": "yen", "CNY": "yuan",
    "RMB": "yuan",
}  # fmt: skip
CURRENCIES = frozenset([*CURRENCY_SIGNS.values(), *CURRENCY_CODES.values(), "pound"])
_EITHER = {"pound": {"lb", "gbp"}}

PERCENT = (["percent"], ["pct"], ["per", "cent"])

_CHANGING = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety once twice thrice double triple half halves
quarter couple score gross grand myriad googol mil mill bil bill thou kilo mega giga tera milli micro nano percent
percentage percentile pct permille permil promille ppm ppb bps basis and nor not but either neither none never nothing
any all some for are was were has have had can cannot may might must should would could will the then than that this
which what where when while until unless except without below above under over more less fewer greater larger smaller
most least about approximately around roughly almost nearly exactly only just maybe perhaps possible impossible
possibly probably undefined unknown infinite infinity invalid valid wrong incorrect correct true false yes negative
opposite inverse reciprocal minus plus times divided multiplied added subtracted sum difference product quotient
remainder power squared cubed square cube doubled tripled quadrupled quintupled halved quartered negated inverted
reversed raised lowered increased decreased reduced incremented decremented rounded truncated repeated repeating
imaginary complex conjugate transpose exponent logarithm hex ternary centi deci pico lac mln mio mrd halfs magnitude
recurring fold factorial choose permute mod modulo base binary octal decimal hexadecimal ratio log sqrt sin cos tan sec
csc cot exp lim sup inf max det gcd lcm arg prime other another per cubic nan null etc equal
"""
_ORDINALS = """
first third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth
seventeenth eighteenth nineteenth twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth
hundredth thousandth
"""
_NO_THINGS = frozenset([*_CHANGING.split(), *_ORDINALS.split(), *SCALES])
_CHANGING_END = re.compile(r"(?<!scaf)(?<!blind)(?:fold|illion|illionth|uple|upled)$")
_NO_PARTICIPLES = frozenset("red seed bed shed sled breed reed weed speed feed".split())  # noqa: SIM905


def known_unit(word: str) -> str | None:
    """Returns the common name of a unit; None for any other word."""
    if word in UNITS or len(word) == 1:
        return UNITS.get(word)
    if word in _PREFIXED:
        return {"Hz": "hz", "kHz": "khz", "MHz": "mhz", "Pa": "pa", "eV": "ev"}.get(word, word)
    small = word.casefold()
    return UNITS.get(small) or UNITS.get(singular(small))


def is_thing(word: str, alone: bool) -> bool:
    """Returns whether a word names the things that are counted.

    A participle `alone` after the number changes the number, as in `5 doubled`.
    """
    small = word.casefold()
    one = singular(small)
    if len(word) <= 2 or not word.isalpha() or {small, one} & _NO_THINGS:
        return False
    participle = alone and small.endswith("ed") and small not in _NO_PARTICIPLES
    return not participle and not any(_CHANGING_END.search(form) for form in (small, one))


def singular(word: str) -> str:
    """Removes a word's plural ending."""
    return re.sub(r"(?<=ch)es$|(?<=[a-z])s$", "", word)


def units_agree(one: str, other: str) -> bool:
    r"""Returns whether two units may follow the same value.

    One may be missing. `\$5` and `\$5\text{ per hour}` are both dollars. Pounds are a weight or a currency.
    """
    if not one or not other or one == other:
        return True
    if other in _EITHER.get(one, ()) or one in _EITHER.get(other, ()):
        return True
    first, also = one.partition("/"), other.partition("/")
    return first[0] == also[0] and first[0] in CURRENCIES and not (first[2] and also[2])
