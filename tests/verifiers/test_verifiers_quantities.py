"""Currency, percent, degrees, units as fractions, words that change a number, commas that separate."""

from __future__ import annotations

import pytest
from helpers.verifiers import accuracy

from popo_lightning.verifiers.equality.latex import canonical
from popo_lightning.verifiers.equality.units import split_unit
from popo_lightning.verifiers.geometry import GeometryVerifier
from popo_lightning.verifiers.math import MathVerifier

RIGHT = [
    # currency before the number, after it, or omitted
    ("5", "₹5"),
    ("5", "\\$5"),
    ("5", "$5"),
    ("5", "\\text{USD }5"),
    ("5", "5\\text{ USD}"),
    ("9500", "USD 9500"),
    ("9500", "EUR 9,500"),
    ("\\$5", "5"),
    ("\\$5", "\\text{USD }5"),
    ("\\$5", "5\\text{ dollars}"),
    ("\\$5", "US\\$5"),
    ("€5", "5\\text{ euros}"),
    ("5", "\\text{€}5"),
    ("€5", "5\\text{ €}"),
    ("5", "\\text{\\$5}"),
    ("₹5", "\\text{Rs. }5"),
    ("€5", "\\text{EUR }5"),
    ("£5", "5\\text{ pounds}"),
    ("£5", "\\pounds 5"),
    ("₹5", "5\\text{ rupees}"),
    ("¥500", "500\\text{ yen}"),
    ("5\\text{ cents}", "5¢"),
    ("\\$5", "\\$5\\text{ per hour}"),
    ("\\$5000000", "\\$5\\text{ million}"),
    ("-\\$5", "-5"),
    ("\\$1.05", "1.05"),
    ("\\$2, \\$3", "3, 2"),
    ("\\$12x+\\$5", "5+12x"),
    # percent and degrees
    ("28\\%", "28 pct"),
    ("28\\%", "28\\text{ per cent}"),
    ("5\\%", "5"),
    ("5^\\circ", "5"),
    # units
    ("5", "5\\ \\Omega"),
    ("5\\ \\Omega", "5"),
    ("5\\ \\Omega", "5\\text{ ohms}"),
    ("5", "5\\,\\mu\\text{m}"),
    ("5\\text{ m/s}", "5\\ \\mathrm{m\\,s^{-1}}"),
    ("5\\text{ m/s}", "5\\frac{\\text{m}}{\\text{s}}"),
    ("5\\text{ m/s}", "5\\,\\text{m}\\,\\text{s}^{-1}"),
    ("5\\text{ m/s}", "5\\,\\frac{\\mathrm{m}}{\\mathrm{s}}"),
    ("5\\text{ m/s}^2", "5\\ \\mathrm{m\\cdot s^{-2}}"),
    ("5\\text{ m/s}^2", "5\\frac{\\text{m}}{\\text{s}^2}"),
    ("5\\text{ N m}", "5\\ \\mathrm{N\\cdot m}"),
    ("5\\text{ kg m/s}", "5\\text{ kg}\\cdot\\text{m}/\\text{s}"),
    ("5\\text{ kJ/mol}", "5\\ \\mathrm{kJ\\,mol^{-1}}"),
    ("5", "5\\ \\mathrm{kJ}"),
    # scales
    ("500000", "5\\text{ lakh}"),
    ("50000000", "5\\text{ crore}"),
    # commas
    ("7, 100", "100, 7"),
    ("36, 100", "100 and 36"),
    ("144 \\text{ and } 12", "12, 144"),
    ("7, 100", "\\{7,100\\}"),
    ("1, 100, 200", "200,\\ 100, 1"),
    ("(7, 100)", "(7,100)"),
    ("12,\\!441,\\!600", "12441600"),
    ("58,500", "58500"),
    ("7, 1000", "1000,7"),
    ("\\text{A and C}", "A, C"),
    ("\\text{A and C}", "C \\text{ and } A"),
    ("\\text{A, B, and D}", "A,B,D"),
    ("\\text{(A), (C)}", "C, A"),
    # a choice letter with its text
    ("14", "\\textbf{(C)}\\ 14"),
    ("\\textbf{(C)}\\ 14", "14"),
    ("\\textbf{(C)}\\ 14", "C"),
    ("\\textbf{(C)}\\ 14", "\\text{(C) }14"),
    ("C", "\\textbf{(C)}\\ 14"),
    ("\\frac{1}{2}", "\\textbf{(A) }\\frac12"),
    ("\\text{(A) } 0", "0"),
    ("14", "(C) 14"),
    ("14", "\\text{C. }14"),
]
WRONG = [
    ("5\\text{ cents}", "\\$5"),
    ("\\$5", "5\\text{ cents}"),
    ("€5", "\\$5"),
    ("£5", "\\text{EUR }5"),
    ("₹5", "\\$5"),
    ("5^\\circ", "\\$5"),
    ("\\$5", "5^\\circ"),
    ("5\\text{ m}", "\\$5"),
    ("5\\text{ m}", "5\\%"),
    ("5\\%", "5\\text{ m}"),
    ("5^\\circ", "5\\%"),
    ("\\$5", "5\\%"),
    ("\\$5", "\\$6"),
    ("5", "\\$5\\text{ million}"),
    ("\\$5", "\\$5€"),
    *(
        ("5", f"5\\text{{ {word}}}")
        for word in (
            "doubled",
            "tripled",
            "quadrupled",
            "halved",
            "negated",
            "inverted",
            "squared",
            "incremented",
            "reversed",
            "crore",
            "lakh",
            "lakhs",
            "quadrillion",
            "sextillion",
            "myriad",
            "basis points",
            "bps",
            "permille",
            "permil",
            "ppm",
            "percentage points",
            "twelfths",
            "fifteenths",
            "twentieths",
            "hundredths",
            "billionths",
            "fold",
            "twofold",
            "tenfold",
            "kilo",
            "mega",
            "repeating",
            "recurring",
            "rounded",
            "truncated",
            "conjugated",
        )
    ),
    ("5", "5‰"),
    *(
        ("5", f"5\\text{{ {word}}}")
        for word in (
            "imaginary",
            "conjugate",
            "transposed",
            "centi",
            "lac",
            "mln",
            "halfs",
            "in hex",
            "dozens",
            "tens",
            "nines",
        )
    ),
    *(
        ("C", text)
        for text in ("(C) 5 (D) 6", "(C)\\text{ or }(D)", "(C) or D", "\\textbf{(C)}, \\textbf{(D)}", "(C), D")
    ),
    ("0.3", "0.3 repeating"),
    ("0.3", "0.3\\text{ recurring}"),
    ("5\\text{ m/s}", "5\\ \\mathrm{m\\,s}"),
    ("5\\text{ m/s}", "5\\frac{\\text{s}}{\\text{m}}"),
    ("5\\text{ m/s}", "5\\ \\mathrm{ms^{-1}}"),
    ("5\\text{ m/s}", "5\\text{ m/s}^2"),
    ("5\\text{ mW}", "5\\text{ MW}"),
    ("5\\text{ kJ}", "5\\text{ J}"),
    ("7, 100", "7100"),
    ("7100", "7, 100"),
    ("250, 750", "250750"),
    ("1, 100, 200", "1100200"),
    ("1, 100, 200", "1, 100200"),
    ("7, 100", "7, 101"),
    ("7,100", "7, 101"),
    ("\\text{A and C}", "A"),
    ("\\text{A and C}", "A, B"),
    ("\\text{A and C}", "A, C, D"),
    ("14", "\\textbf{(C)}\\ 15"),
    ("\\textbf{(C)}\\ 14", "\\textbf{(D)}\\ 14"),
    ("\\textbf{(C)}\\ 14", "\\textbf{(C)}\\ 15"),
    ("\\textbf{(C)}\\ 14", "D"),
    ("\\textbf{(C)}\\ 14", "15"),
    ("D", "\\textbf{(C)}\\ 14"),
    ("14", "\\textbf{(C)}"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_the_same(gold: str, answer: str) -> None:
    assert accuracy(gold, answer) == 1


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_not_the_same(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert accuracy(gold, answer) == 0
    assert verifier(answer, f"\\boxed{{{answer}}}")["acc"] == 1


def test_a_gold_that_may_be_a_list_or_a_number_takes_both_spellings(verifier: MathVerifier) -> None:
    """Debatable: `7,100` is 7100 and also the list `7, 100` without its space. The gold decides which is meant."""
    assert verifier("7, 100", "\\boxed{7,100}")["acc"] == 1
    assert verifier("7,100", "\\boxed{7, 100}")["acc"] == 1
    assert verifier("7,100", "\\boxed{7100}")["acc"] == 1


def test_pounds_are_a_weight_and_a_currency(verifier: MathVerifier) -> None:
    """Debatable: the word does not say which, so it matches both. The two do not match each other."""
    assert (
        verifier("£5", "\\boxed{5\\text{ pounds}}")["acc"] == verifier("5\\text{ pounds}", "\\boxed{5 lb}")["acc"] == 1
    )
    assert verifier("£5", "\\boxed{5\\text{ lb}}")["acc"] == 0


def test_a_participle_alone_is_no_thing(verifier: MathVerifier) -> None:
    """Debatable: `5 needed` means 5 and `5 doubled` does not. A list of harmless words could not be complete."""
    assert verifier("5", "\\boxed{5\\text{ needed}}")["acc"] == 0
    assert (
        verifier("5", "\\boxed{5\\text{ red}}")["acc"] == verifier("5", "\\boxed{5\\text{ colored balls}}")["acc"] == 1
    )


def test_a_figure_in_percent_is_no_length() -> None:
    geometry = GeometryVerifier()
    for gold, answer in (("5\\text{ cm}", "5\\%"), ("5\\text{ cm}", "\\$5"), ("5\\%", "5\\text{ cm}")):
        assert geometry(gold, f"\\boxed{{{answer}}}")["acc"] == 0


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("\\$5", "5", "dollar"),
        ("-\\$5", "-5", "dollar"),
        ("\\text{USD }5", "5", "dollar"),
        ("\\$5\\text{ per hour}", "5", "dollar/h"),
        ("5\\ \\mathrm{m\\,s^{-1}}", "5", "m/s"),
        ("5\\frac{\\text{m}}{\\text{s}}", "5", "m/s"),
        ("5\\ \\mathrm{kJ\\,mol^{-1}}", "5", "kJ/mol"),
        ("5\\ \\Omega", "5", "ohm"),
        ("5\\text{th}", "5", "ordinal"),
        ("36^\\circ 30'", "\\frac{73}{2}", "degree"),
    ],
)
def test_split_unit(text: str, value: str, unit: str) -> None:
    assert split_unit(canonical(text)) == (value, unit)
