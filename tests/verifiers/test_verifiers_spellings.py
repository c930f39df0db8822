"""Choices, logarithms, inequalities, named tuples, restated numbers and fonts: one answer in several spellings."""

from __future__ import annotations

import pytest
from helpers.verifiers import accuracy

from popo_lightning.verifiers.equality.latex import canonical
from popo_lightning.verifiers.equality.regions import interval_of

RIGHT = [
    *(("A", text) for text in ("(A)", "\\text{(A)}", "\\mathrm{(A)}", "\\text{A.}", "\\text{A}", "A)", "\\text{(A).}")),
    ("C", "\\textbf{(C)}"),
    ("(C)", "C"),
    ("\\text{(C)}", "\\textbf{C}"),
    *(
        ("\\log_2 3", text)
        for text in ("\\log_2(3)", "\\log_{2}{3}", "\\log_2{3}", "\\log_23", "\\frac{\\log 3}{\\log 2}")
    ),
    ("\\log_2(3)", "\\log_2 3"),
    ("2+\\log_2 3", "\\log_2 12"),
    ("18", "18\\ "),
    *(("18", text) for text in ("\\boldsymbol{18}", "\\bm{18}", "\\mathbf{18}", "€18", "£18", "\\pounds 18", "€18.00")),
    ("\\frac{37}{2}", "\\mathbf{\\frac{37}{2}}"),
    ("18.5", "\\boldsymbol{\\frac{37}{2}}"),
    ("(2,3)", "(x,y)=(2,3)"),
    ("(x,y)=(2,3)", "(2,3)"),
    ("(1,2,3)", "(a, b, c) = (1, 2, 3)"),
    ("7.5", "\\frac{15}{2}=7.5"),
    ("7.5", "\\frac{15}{2}=7\\frac{1}{2}=7.5"),
    ("(-\\infty,3]", "x \\le 3"),
    ("(2,\\infty)", "x>2"),
    ("(2,\\infty)", "2<x"),
    ("[1,3]", "1\\le x\\le 3"),
    ("(1,3]", "3\\ge x>1"),
    ("x \\in (2,\\infty)", "x>2"),
    ("x>2", "x \\in (2,\\infty)"),
    ("x \\le 3", "(-\\infty,3]"),
    ("[\\frac{1}{2},\\sqrt{8}]", "0.5 \\le t \\le 2\\sqrt{2}"),
]
RIGHT += [("AB", "BA"), ("xy", "yx"), ("2AB", "2BA"), ("BAC", "\\text{BAC}"), ("IX", "\\text{IX}")]
WRONG = [
    *(("BAC", text) for text in ("ABC", "CAB", "\\text{ABC}", "(ABC)", "BA")),
    *(("IX", text) for text in ("XI", "\\text{XI}", "IXI")),
    ("IV", "VI"),
    ("HTT", "TTH"),
    ("AB", "CD"),
    *(("A", text) for text in ("B", "\\text{(B)}", "a", "\\text{AB}", "(A,B)", "\\text{A or B}")),
    *(("\\log_2 3", text) for text in ("\\log_3 2", "\\log_{23}", "\\log_2 5", "\\log 3", "\\log_2 3 + 1")),
    ("18", "\\mathbf{19}"),
    ("18", "€19"),
    ("18", "\\mathbf{18x}"),
    ("(2,3)", "(x,y)=(3,2)"),
    ("(2,3)", "(x,y)=5"),
    ("5", "(x,y)=5"),
    ("(x,y)=(2,3)", "(y,x)=(2,3)"),
    ("(2,3)", "(x,y,z)=(2,3)"),
    ("7.5", "\\frac{15}{2}=7.6"),
    ("7.5", "\\frac{16}{2}=7.5"),
    ("7.5", "7.5=7.5"),
    ("5", "2+3=5"),
    ("(-\\infty,3]", "x<3"),
    ("(-\\infty,3]", "3 \\le x"),
    ("(2,\\infty)", "x \\ge 2"),
    ("(2,\\infty)", "x<2"),
    ("[1,3]", "1<x\\le 3"),
    ("[1,3]", "1\\le x"),
    ("(1,3)", "1<x>3"),
    ("(1,3)", "3<x<1"),
    ("x \\in (2,\\infty)", "y>2"),
    ("\\{1,3\\}", "1<x<3"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_the_same(gold: str, answer: str) -> None:
    assert accuracy(gold, answer) == 1


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_not_the_same(gold: str, answer: str) -> None:
    assert accuracy(gold, answer) == 0


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("x<3", ("x", "(-\\infty,3)")),
        ("3 \\ge \\theta", ("\\theta", "(-\\infty,3]")),
        ("-1 < x \\le 2", ("x", "(-1,2]")),
        ("2 \\ge x > -1", ("x", "(-1,2]")),
        ("x=3", None),
        ("x<y", None),
        ("x<3a", None),
        ("xy<3", None),
        ("1<2<x", None),
        ("1<x<2<3", None),
        ("x<", None),
        ("x \\ne 3", None),
        ("3", None),
    ],
)
def test_interval_of(text: str, read: tuple[str, str] | None) -> None:
    assert interval_of(canonical(text)) == read


def test_the_base_of_a_logarithm_is_in_braces() -> None:
    spelled = {canonical(text) for text in ("\\log_2 3", "\\log_{2}3", "\\log_2{3}", "\\log_23", "\\log_{2} {3}")}
    assert spelled == {"\\log_{2}3"}
    assert canonical("\\log_{10} 5") == "\\log_{10}5"
