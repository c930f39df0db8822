"""Text after a number: units and things, scales, and words that change or deny the number."""

from __future__ import annotations

import pytest

from popo_lightning.verifiers.equality.latex import canonical
from popo_lightning.verifiers.equality.units import split_unit
from popo_lightning.verifiers.math import MathVerifier

RIGHT = [
    ("12", "12\\text{ apples}"),
    ("12", "12\\text{ distinct integers}"),
    ("6", "\\text{6 apples}"),
    ("12", "12\\text{ square units}"),
    ("12", "12 square units"),
    ("12\\text{ units}", "12\\text{ square units}"),
    ("12", "12\\text{ cm}^2"),
    ("12", "12 \\mathrm{~cm}^{3}"),
    ("12\\text{ cm}^2", "12\\text{ square centimeters}"),
    ("12\\text{ cm}^2", "12\\text{ cm squared}"),
    ("12\\text{ feet}", "12 ft"),
    ("12\\text{ ft}^2", "12 \\text{ sq. ft}"),
    ("5", "5\\text{ in.}"),
    ("5", "5 inches"),
    ("12", "12 miles per hour"),
    ("60\\text{ mph}", "60\\text{ miles per hour}"),
    ("60", "60 km/h"),
    ("60", "60\\text{ m/s}"),
    ("5\\text{ m/s}^2", "5 \\text{ m/s}^{2}"),
    ("25\\pi", "25\\pi\\text{ cm}^2"),
    ("25\\pi", "25\\pi cm^2"),
    ("3\\sqrt{2}", "3\\sqrt{2}\\text{ cm}"),
    ("3:24\\text{ pm}", "3:24\\text{ p.m.}"),
    ("90", "90\\text{ degrees}"),
    ("90^\\circ", "90\\text{ degrees}"),
    ("25^\\circ\\text{C}", "25"),
    ("\\$70", "70\\text{ dollars}"),
    # scales and percent
    ("70000", "70 thousand"),
    ("70000", "70\\text{ thousand dollars}"),
    ("200000", "2\\text{ hundred thousand}"),
    ("1.5\\text{ million}", "1500000"),
    ("1500000", "1.5\\text{ million}"),
    ("36", "3\\text{ dozen}"),
    ("250", "\\frac{1}{4}\\text{ thousand}"),
    ("12\\%", "12\\text{ percent}"),
    ("12", "12 percent"),
    ("0.25", "25\\text{ percent}"),
]
WRONG = [
    *(("12", f"12\\text{{ {scale}}}") for scale in ("million", "dozen", "millions", "hundred thousand", "hundreds")),
    ("12", "12 hundred"),
    ("12", "\\text{12 million}"),
    ("12", "12\\text{ thousand dollars}"),
    ("70", "70 thousand"),
    ("70", "70\\text{K}"),
    *(("5", f"5\\text{{ {word}}}") for word in ("factorial", "squared", "cubed", "x", "no", "i", "apples squared")),
    *(("5", f"5{letters}") for letters in ("abcd", "sqrt", "m", "am", "apples cubed", "per", "square")),
    *(
        ("3", f"3\\text{{ {words}}}")
        for words in ("or none", "or more", "thirds", "halves", "is impossible", "and a half")
    ),
    *(
        ("3", f"3\\text{{ {words}}}")
        for words in ("at least", "more than", "not", "times two", "plus one", "in binary")
    ),
    ("5", "\\text{5x}"),
    ("5", "5^\\circ\\text{ squared}"),
    ("3", "3\\mathrm{i}"),
    ("2", "2\\mathrm{e}"),
    ("2", "2pi"),
    ("1,2", "1,2\\text{ squared}"),
    ("x=5", "5\\text{ squared}"),
    ("40\\text{ cm}", "40\\text{ cm}^2"),
    ("40\\text{ m}", "40\\text{ miles}"),
    ("40\\text{ m/s}", "40\\text{ m}"),
    ("5\\text{ am}", "5\\text{ pm}"),
    ("90^\\circ", "90\\text{ radians}"),
    ("6\\text{ apples}", "6\\text{ pears}"),
    ("70001", "70\\text{ thousand}"),
    ("2\\pi", "2\\pi\\text{ million}"),
]


@pytest.fixture(scope="module")
def verifier() -> MathVerifier:
    return MathVerifier()


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_units_may_be_missing_or_spelled_otherwise(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert verifier(gold, f"\\boxed{{{answer}}}")["acc"] == 1
    assert verifier(answer, f"\\boxed{{{gold}}}")["acc"] == 1


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_other_words_are_no_units(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert verifier(gold, f"\\boxed{{{answer}}}")["acc"] == 0
    assert verifier(answer, f"\\boxed{{{gold}}}")["acc"] == 0
    assert verifier(answer, f"\\boxed{{{answer}}}")["acc"] == 1


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("12\\text{ square feet}", "12", "ft^2"),
        ("12 sq ft", "12", "ft^2"),
        ("12\\text{ big red and green balls}", "12\\text{big red and green balls}", ""),
        ("3\\text{ a b}", "3\\text{a b}", ""),
        ("3" + "\\text{ big red old new hot wet dry balls}", "3\\text{big red old new hot wet dry balls}", ""),
        ("12 square feet", "12", "ft^2"),
        ("9.8\\text{ meters per second squared}", "9.8", "m/s^2"),
        ("3\\text{ big red balls}", "3", "bigredball"),
        ("45^\\circ F", "45", "degreeF"),
        ("2.5\\text{ million people}", "2500000", "people"),
        ("0.125\\text{ hundred}", "\\frac{25}{2}", ""),
        ("12\\text{ percent}", "12%", ""),
        ("12", "12", ""),
        ("12\\text{ of}", "12\\text{of}", ""),
    ],
)
def test_split_unit(text: str, value: str, unit: str) -> None:
    assert split_unit(canonical(text)) == (value, unit)
