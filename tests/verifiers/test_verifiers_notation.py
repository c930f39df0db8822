"""Unicode, repeating decimals, mixed numbers, fractions, matrices, functions: one value in several notations."""

from __future__ import annotations

import pytest
from helpers.verifiers import accuracy

from popo_lightning.verifiers.equality.latex import canonical
from popo_lightning.verifiers.equality.numbers import read_number

RIGHT = [
    # roots
    ("\\sqrt{17}", "√17"),
    ("\\sqrt{17}", "\\sqrt17"),
    ("\\sqrt{17}", "√{17}"),
    ("2\\sqrt{17}", "2√17"),
    ("2\\sqrt{17}", "√68"),
    ("5", "√25"),
    ("3", "√(9)"),
    ("3", "\\sqrt(9)"),
    ("\\sqrt{1.5}", "√1.5"),
    ("\\frac{\\sqrt{15}}{2}", "√15/2"),
    ("\\frac{\\sqrt{15}}{2}", "(√15)/2"),
    ("\\sqrt{\\frac{1}{2}}", "√½"),
    ("2", "∛8"),
    ("3", "∜81"),
    ("\\sqrt{x+1}", "√(x+1)"),
    ("\\frac{\\sqrt{3}}{2}", "\\frac\\sqrt32"),
    # powers, subscripts and fractions in one character
    ("x^{12}", "x¹²"),
    ("x^{-3}", "x⁻³"),
    ("2^n", "2ⁿ"),
    ("6.02\\times10^{23}", "6.02 × 10²³"),
    ("1.6\\times10^{-19}", "1.6 × 10⁻¹⁹"),
    ("52_8", "52₈"),
    ("52_8", "(52)_8"),
    ("52_8", "52_{(8)}"),
    ("52_8", "52\\text{ (base 8)}"),
    ("\\frac12", "½"),
    ("½", "1/2"),
    ("\\frac{7}{2}", "3½"),
    ("\\frac{7}{8}", "⅞"),
    ("\\frac{3}{4}", "3⁄4"),
    # letters and signs
    ("\\alpha", "α"),
    ("2\\beta+\\gamma", "2β+γ"),
    ("\\Delta", "Δ"),
    ("\\phi", "ϕ"),
    ("\\varphi", "φ"),
    ("\\mathbb{R}", "ℝ"),
    ("\\emptyset", "∅"),
    ("\\emptyset", "\\{\\}"),
    ("\\varnothing", "\\{ \\}"),
    ("2\\pi r", "2πr"),
    # full-width punctuation
    ("3，5", "3,5"),
    ("3,5", "3、5"),
    ("(3,5)", "（3，5）"),
    ("x=5", "x＝5"),
    ("28\\%", "28％"),
    ("12", "１２"),
    ("1:2", "1：2"),
    # repeating decimals
    ("0.\\overline{42}", "\\frac{14}{33}"),
    ("\\frac{14}{33}", "0.\\overline{42}"),
    ("\\frac{14}{33}", "0.424242\\ldots"),
    ("\\frac{14}{33}", "0.(42)"),
    ("\\frac{14}{33}", "0.4242..."),
    ("\\frac13", "0.\\overline{3}"),
    ("\\frac13", "0.\\bar{3}"),
    ("\\frac13", "0.\\bar 3"),
    ("\\frac13", "0.\\dot{3}"),
    ("\\frac13", "0.3̅"),
    ("\\frac13", "0.333..."),
    ("\\frac13", "0.333…"),
    ("\\frac13", "0.333\\dots"),
    ("\\frac13", "0.(3)"),
    ("\\frac13", ".333\\ldots"),
    ("\\frac13", "0.3\\text{ repeating}"),
    ("\\frac13", "0.\\overline{33}"),
    ("-\\frac{1}{6}", "-0.1\\overline{6}"),
    ("-\\frac{1}{6}", "-0.1(6)"),
    ("\\frac17", "0.\\dot{1}4285\\dot{7}"),
    ("1.2\\overline{3}", "1.2333\\ldots"),
    ("1.2\\overline{3}", "\\frac{37}{30}"),
    ("1.2\\overline{3}", "1\\frac{7}{30}"),
    ("1", "0.999..."),
    ("(\\frac13,2)", "(0.\\overline{3},2)"),
    ("33.\\overline{3}\\%", "33\\frac13\\%"),
    ("133.\\overline{3}", "\\frac{400}{3}"),
    ("\\frac13\\pi", "0.\\overline{3}\\pi"),
    ("614.519...", "614.519"),
    ("1.7724", "1.7724\\ldots"),
    ("119.888...", "\\frac{1079}{9}"),
    ("119.888...", "119.888"),
    # mixed numbers
    ("3\\frac14", "3 1/4"),
    ("\\frac{13}{4}", "3 1/4"),
    ("-\\frac{13}{4}", "-3 1/4"),
    ("3.25", "3 1/4"),
    ("3\\frac14\\text{ inches}", "3 1/4 inches"),
    ("3 1/4", "13/4"),
    # other LaTeX habits
    ("\\frac{3}{4}", "{3 \\over 4}"),
    ("\\frac{3}{4}", "3 \\over 4"),
    ("\\frac{\\sqrt{3}}{x+1}", "{\\sqrt 3 \\over {x+1}}"),
    ("2+\\frac{1}{3}", "2+{1\\over3}"),
    ("\\binom{5}{2}", "{5 \\choose 2}"),
    ("\\log 2", "\\operatorname{log}(2)"),
    ("\\ln 2", "\\mathrm{ln}\\,2"),
    ("\\ln 2", "\\text{ln}(2)"),
    ("\\arctan 2", "\\operatorname{arctan}(2)"),
    ("\\sec x", "\\operatorname{sec} x"),
    ("\\sin x", "\\mathrm{sin}(x)"),
    ("2-\\frac{1}{\\mathrm{e}}", "2-e^{-1}"),
    ("\\mathrm{e}^{2}", "e^2"),
    ("1+2\\mathrm{i}", "1+2i"),
    ("\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "\\left(\\begin{array}{c} 1 \\\\ -2 \\end{array}\\right)"),
    (
        "\\begin{pmatrix} 1 & 0 \\\\ 0 & 2 \\end{pmatrix}",
        "\\left[\\begin{array}{cc} 1 & 0 \\\\ 0 & 2 \\end{array}\\right]",
    ),
    (
        "\\begin{pmatrix} 1 & 0 \\\\ 0 & 2 \\end{pmatrix}",
        "\\left(\\begin{matrix} 1 & 0 \\\\ 0 & 2 \\end{matrix}\\right)",
    ),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix} 1 \\\\ 2 \\\\ \\end{bmatrix}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\left(\\begin{smallmatrix} 1 \\\\ 2 \\end{smallmatrix}\\right)"),
    ("(1,2)", "\\langle 1,2\\rangle"),
    ("1,2,\\ldots,10", "1, 2, \\dots, 10"),
    ("1,2,\\ldots,10", "1,2,...,10"),
    ("1,2,3,\\ldots", "1,2,3,…"),
    ("1+2+\\cdots+n", "1+2+\\dots+n"),
    # ordinals
    ("5", "5^{\\text{th}}"),
    ("5", "5^{th}"),
    ("5", "5\\text{th}"),
    ("5", "5\\text{ th}"),
    ("5", "5th"),
    ("3", "3^{\\text{rd}}"),
    ("21^{\\text{st}}", "21"),
    ("112", "112\\textsuperscript{th}"),
]
WRONG = [
    ("5", "√15"),
    ("15", "√15"),
    ("5", "\\sqrt15"),
    ("\\sqrt{15}", "√1·5"),
    ("3", "√(8)"),
    ("2", "∛9"),
    ("x^{12}", "x²¹"),
    ("x^{12}", "x^{1}2"),
    ("12", "1²"),
    ("52_8", "52_{(9)}"),
    ("52_8", "52"),
    ("\\frac12", "⅓"),
    ("\\frac32", "3½"),
    ("\\alpha", "β"),
    ("\\alpha", "a"),
    ("\\mathbb{R}", "ℤ"),
    ("\\mathbb{R}", "R"),
    ("\\emptyset", "0"),
    ("\\emptyset", "\\{0\\}"),
    ("\\emptyset", "\\{\\emptyset\\}"),
    ("3,5", "3.5"),
    ("35", "3、5"),
    ("7100", "7，100"),
    ("\\frac13", "0.3"),
    ("\\frac13", "0.3333"),
    ("\\frac13", "0.33\\overline{4}"),
    ("\\frac13", "0.34..."),
    ("\\frac13", "0.(4)"),
    ("0.3", "0.3\\text{ repeating}"),
    ("0.3", "0.\\overline{3}"),
    ("0.3", "0.333..."),
    ("0.42", "0.\\overline{42}"),
    ("\\frac{16}{99}", "0.16\\text{ repeating}"),
    ("0.1\\overline{6}", "0.\\overline{16}"),
    ("0.6", "0.1(6)"),
    ("\\frac{1}{3}", "0.3..."),
    ("\\sqrt{2}", "1.414..."),
    ("\\sqrt{2}", "1.4142\\ldots"),
    ("e", "2.718281828..."),
    ("1,2,3", "1,2,3,\\ldots"),
    ("1,2,\\ldots,10", "1,2,10"),
    ("3\\frac14", "3-1/4"),
    ("3\\frac14", "3/4"),
    ("\\frac{3}{4}", "3 1/4"),
    ("\\frac{31}{4}", "3 1/4"),
    ("\\frac{3}{4}", "{4 \\over 3}"),
    ("\\ln 2", "\\mathrm{ln}\\,3"),
    ("\\ln 2", "\\log_2 2"),
    ("2-\\frac{1}{e}", "2-\\mathrm{e}"),
    ("\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "\\left(\\begin{array}{c} -2 \\\\ 1 \\end{array}\\right)"),
    ("\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "\\left(\\begin{array}{cc} 1 & -2 \\end{array}\\right)"),
    ("5", "5\\text{nd}"),
    ("5", "5^{\\text{rd}}"),
    ("5", "6^{\\text{th}}"),
    ("11", "11^{\\text{st}}"),
    ("5\\text{ apples}", "5^{\\text{th}}"),
    ("\\frac15", "5\\text{ths}"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_the_same(gold: str, answer: str) -> None:
    assert accuracy(gold, answer) == 1


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_not_the_same(gold: str, answer: str) -> None:
    assert accuracy(gold, answer) == 0


def test_unicode_is_latex_afterwards() -> None:
    assert canonical("2√15") == canonical("2\\sqrt{15}") == "2\\sqrt{15}"
    assert canonical("x⁻¹²") == "x^{-12}"
    assert canonical("3½") == canonical("3\\frac12")
    assert canonical("ℝ") == canonical("\\mathbb{R}")


def test_a_root_of_letters_in_unicode_ends_after_one() -> None:
    """`√ab` is written for both `√a·b` and `√(ab)`. Like TeX's `\\sqrt ab`, it is read as the first."""
    assert canonical("√ab") == canonical("\\sqrt ab") == "\\sqrt{a}b"


def test_digits_in_brackets_after_the_point_repeat() -> None:
    """A computer may read `0.1(6)` as the product 0.6. Written as an answer, it is 1/6."""
    one = read_number("0.1(6)")
    assert one is not None and one.value.as_integer_ratio() == (1, 6)


def test_repeating_decimals_are_exact_or_nothing() -> None:
    for text in (
        "0.\\overline{}",
        "0.()",
        "0.\\overline{3}4",
        "3\\overline{3}",
        "0.12\\ldots",
        "0." + "3" * 200 + "\\ldots",
    ):
        assert read_number(text) is None
