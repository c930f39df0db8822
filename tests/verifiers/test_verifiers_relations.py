"""Other forms of equations and inequalities, sets by membership, unions in words, values of names, approximations."""

from __future__ import annotations

import pytest
from helpers.verifiers import accuracy

from popo_lightning.verifiers.equality.latex import canonical
from popo_lightning.verifiers.equality.regions import region_of
from popo_lightning.verifiers.geometry import GeometryVerifier
from popo_lightning.verifiers.math import MathVerifier

RIGHT = [
    # scaled by any constant
    ("y=\\frac{1}{3}x", "3y=x"),
    ("y=\\frac{1}{3}x", "x-3y=0"),
    ("y=\\frac{1}{3}x", "x=3y"),
    ("x+y=3", "7x+7y=21"),
    ("y=\\frac{x}{\\pi}", "\\pi y=x"),
    ("y=\\frac{2}{3}x-1", "2x-3y=3"),
    ("y=-\\frac{1}{2}x+\\frac{1}{3}", "3x+6y-2=0"),
    ("x^2+y^2=7", "\\frac{x^2}{7}+\\frac{y^2}{7}=1"),
    ("\\frac{x^2}{9}+\\frac{y^2}{7}=1", "7x^2+9y^2=63"),
    ("(x-1)^2+y^2=3", "3x^2-6x+3y^2=6"),
    ("y\\ge\\frac{1}{3}x+2", "3y-x\\geq 6"),
    ("y\\ge\\frac{1}{3}x+2", "x-3y\\le-6"),
    ("x+y<\\sqrt{2}", "\\sqrt2 x+\\sqrt2 y<2"),
    # names
    ("7", "7=x"),
    ("(1,2)", "x=1, y=2"),
    ("(1,2)", "x=1,\\ y=2"),
    ("(1,2)", "y=2, x=1"),
    ("(3,4)", "x=3,y=4"),
    ("(1,2)", "x=1 \\text{ and } y=2"),
    ("(1,2,3)", "a=1,b=2,c=3"),
    ("(3,2)", "m=3,b=2"),
    ("x=1, y=2", "(1,2)"),
    ("x=1, y=2", "y=2, x=1"),
    ("(x,y)=(1,2)", "x=1,y=2"),
    ("(1,2)", "\\begin{cases} x=1 \\\\ y=2 \\end{cases}"),
    ("(1,2)", "x_1=1, x_2=2"),
    ("(1,2)", "x = 1 \\text{, } y = 2"),
    ("(1,2)", "x=1 \\quad y=2"),
    ("2,1", "x_1=1, x_2=2"),
    ("x_1=1, x_2=2", "2, 1"),
    ("2,1", "m=1,n=2"),
    # membership
    ("4,5,7", "k \\in \\{4,5,7\\}"),
    ("k \\in \\{4,5,7\\}", "7,5,4"),
    ("\\{1, 2\\}", "x\\in\\{1,2\\}"),
    ("\\{0,1\\}", "S=\\{0,1\\}"),
    ("0,1", "S=\\{1,0\\}"),
    ("x\\in\\{1,2\\}", "x=1\\text{ or }x=2"),
    ("5", "x\\in\\{5\\}"),
    ("\\emptyset", "x\\in\\emptyset"),
    # the real line and unions
    ("(-\\infty,\\infty)", "\\mathbb{R}"),
    ("\\mathbb{R}", "(-\\infty,\\infty)"),
    ("\\mathbb{R}", "(-\\infty,+\\infty)"),
    ("\\mathbb{R}", "x\\in\\mathbb{R}"),
    ("\\mathbb{R}", "\\text{all real numbers}"),
    ("-1\\le x<4", "4>x\\ge-1"),
    ("[-1,4)", "x\\ge-1\\text{ and }x<4"),
    ("(-\\infty,-1)\\cup(3,\\infty)", "x<-1 \\text{ or } x>3"),
    ("(-\\infty,-1)\\cup(3,\\infty)", "x>3 \\lor x<-1"),
    ("(-\\infty,-1)\\cup(3,\\infty)", "x<-1 or x>3"),
    ("x<-1 \\text{ or } x>3", "(-\\infty,-1)\\cup(3,\\infty)"),
    ("x<-1 \\text{ or } x>3", "x\\in(3,\\infty)\\cup(-\\infty,-1)"),
    ("x<-1 \\text{ or } x>3", "3<x \\text{ or } -1>x"),
    ("(-\\infty,0)\\cup\\{1\\}", "a<0 \\text{ or } a=1"),
    ("(0,1)\\cup(2,3]", "0<x<1\\text{ or }2<x\\le3"),
    ("x\\ne2", "(-\\infty,2)\\cup(2,\\infty)"),
    ("(-\\infty,2)\\cup(2,\\infty)", "\\mathbb{R}\\setminus\\{2\\}"),
    ("(-\\infty,-2)\\cup(-2,2)\\cup(2,\\infty)", "x\\ne\\pm2"),
    ("(-\\infty,1)\\cup(1,3)\\cup(3,\\infty)", "\\mathbb{R}\\setminus\\{1,3\\}"),
    ("(2,3)", "\\{x \\mid 2 < x < 3\\}"),
    ("\\{x \\mid 2 < x < 3\\}", "2<x<3"),
    ("(2,\\infty)", "\\{x\\in\\mathbb{R} : x>2\\}"),
    # approximations
    ("40.2", "x\\approx40.2"),
    ("40.2", "\\approx 40.2"),
    ("40.2", "≈40.2"),
    ("40.2", "\\text{approximately } 40.2"),
    ("40.2", "40.2 \\text{ (approximately)}"),
    ("40.2", "\\text{about }40.2\\text{ cm}"),
    ("40.2", "approximately 40.2"),
    ("40.2", "\\text{approx. }40.2"),
    ("40.2", "\\text{approximately 40.2}"),
    ("\\frac{3}{4}", "\\dfrac{3}{4}\\approx 0.75"),
    ("\\frac{2}{3}", "\\frac{2}{3} \\approx 0.667"),
    ("\\frac{2}{3}", "\\frac{2}{3} \\approx 0.66"),
    ("\\frac{2}{3}", "x=\\frac{2}{3} \\approx 0.667"),
    ("\\sqrt{2}", "\\sqrt{2}\\approx1.414"),
    ("2\\pi", "2\\pi\\approx6.28"),
    ("1.414", "\\sqrt{2}\\approx1.414"),
    ("\\$\\dfrac23 \\approx \\$0.67", "\\frac23"),
    ("\\$\\dfrac23 \\approx \\$0.67", "0.67"),
    ("\\approx 8.24 \\text{ mph}", "8.24"),
]
WRONG = [
    ("y=\\frac{1}{3}x", "y=3x"),
    ("y=\\frac{1}{3}x", "3x=y"),
    ("y=\\frac{1}{3}x", "3y=x+1"),
    ("y=\\frac{1}{3}x", "0=0"),
    ("y=\\frac{1}{3}x", "3y=y"),
    ("x+y=3", "7x+7y=20"),
    ("y=\\frac{x}{\\pi}", "3.14y=x"),
    ("\\frac{x^2}{9}+\\frac{y^2}{7}=1", "9x^2+7y^2=63"),
    ("y\\ge\\frac{1}{3}x+2", "3y-x\\le 6"),
    ("y\\ge\\frac{1}{3}x+2", "3y-x> 6"),
    ("y\\ge\\frac{1}{3}x+2", "x-3y\\ge-6"),
    ("7", "8=x"),
    ("7", "7=7"),
    ("7", "x=7=y+1"),
    ("x=7", "7=y"),
    ("(1,2)", "x=2,y=1"),
    ("(1,2)", "y=1,x=2"),
    ("(1,2)", "x=1,x=2"),
    ("(1,2)", "x=1,y=2,z=3"),
    ("[1,2]", "x=1,y=2"),
    ("x=1,y=2", "(2,1)"),
    ("x=1,y=2", "2,1"),
    ("4,5,7", "k \\in \\{4,5\\}"),
    ("4,5,7", "k \\in \\{4,5,8\\}"),
    ("x\\in\\{1,2\\}", "y\\in\\{1,2\\}"),
    ("x\\in\\{1,2\\}", "y=1\\text{ or }y=2"),
    ("(1,2)", "x\\in\\{1,2\\}"),
    ("\\{1,2\\}", "x\\in(1,2)"),
    ("\\mathbb{R}", "(0,\\infty)"),
    ("\\mathbb{R}", "[-\\infty,0]"),
    ("\\mathbb{R}", "\\mathbb{Z}"),
    ("-1\\le x<4", "4\\ge x>-1"),
    ("-1\\le x<4", "-1\\le y<4"),
    ("(-\\infty,-1)\\cup(3,\\infty)", "x<-1 \\text{ or } x\\ge3"),
    ("(-\\infty,-1)\\cup(3,\\infty)", "x<-1"),
    ("(-\\infty,-1)\\cup(3,\\infty)", "x<-1 \\text{ or } y>3"),
    ("(-\\infty,-1)\\cup(3,\\infty)", "-1<x<3"),
    ("(-1,3)", "x<-1 \\text{ or } x>3"),
    ("x\\ne2", "\\mathbb{R}"),
    ("x\\ne2", "x\\ne3"),
    ("x\\ne2", "2"),
    ("2", "x\\ne2"),
    ("(2,3)", "\\{x \\mid 2 < x \\le 3\\}"),
    ("(2,3)", "\\{x \\mid 2 < y < 3\\}"),
    ("40.2", "x\\approx40.3"),
    ("\\frac{2}{3}", "\\approx 0.667"),
    ("\\frac{2}{3}", "0.667"),
    ("\\frac{2}{3}", "\\frac{2}{3}\\approx 5"),
    ("\\frac{2}{3}", "\\frac{3}{4}\\approx 0.75"),
    ("\\frac{2}{3}", "0.667\\approx\\frac{3}{4}"),
    ("5", "4.5\\approx5"),
    ("5", "6\\approx5"),
    ("5", "5\\approx6"),
    ("5", "5\\approx5.4"),
    ("5.1", "5\\approx5.1"),
    ("5", "\\text{about }5\\text{ or }6"),
    ("(1,2)", "\\begin{cases} x=2 \\\\ y=1 \\end{cases}"),
    ("\\mathbb{R}", "\\text{real}"),
    ("\\sqrt{2}", "x\\approx1.414"),
    ("\\sqrt{2}", "\\text{about }1.414"),
]
FIGURES = [
    ("12.5", "\\overline{BC} = 12.5"),
    ("12.5", "|BC| = 12.5"),
    ("12.5", "BC = 12.5"),
    ("12.5", "AB = BC = 12.5"),
    ("12.5", "|\\overline{BC}| = 12.5"),
    ("12.5", "[ABC] = 12.5"),
    ("72", "m\\angle{ABC}=72"),
    ("12.5", "\\text{length of }BC=12.5"),
    ("12.5", "m\\overline{BC}=12.5"),
    ("12.5", "\\text{Area}=12.5\\text{ cm}^2"),
    ("12.5", "A_{\\triangle ABC}=12.5"),
    ("0.6", "\\sin A = 0.6"),
    ("\\frac{3}{5}", "\\cos\\angle ABC=\\frac35"),
    ("0.75", "\\tan(\\theta)=\\frac34"),
    ("72", "m\\angle 3=72"),
    ("72", "m\\angle 3=72^\\circ"),
    ("72", "\\angle 3=72"),
    ("72", "m\\angle ABC = 72"),
    ("72", "m∠3=72"),
    ("72", "m\\widehat{AB}=72^\\circ"),
    ("72", "\\overset{\\frown}{AB}=72"),
    ("72", "\\text{arc }AB=72"),
    ("72", "m\\overarc{AB}=72"),
    ("36^\\circ 30'", "36.5^\\circ"),
    ("36.5", "36^\\circ 30'"),
    ("36.5", "36°30′"),
    ("36.51", "36^\\circ 30' 36''"),
]
OTHER_FIGURES = [
    ("12.5", "\\overline{BC} = 12"),
    ("12.5", "\\overline{BC}"),
    ("12.5", "AB = 12.5 = 13"),
    ("12.5", "AB = 12.5 = BC+1"),
    ("0.6", "\\sin A = 0.8"),
    ("0.6", "\\sin A"),
    ("72", "m\\angle 3=73"),
    ("72", "m\\angle 72"),
    ("72", "\\angle 72=3"),
    ("3", "m\\angle 3"),
    ("36.3", "36^\\circ 30'"),
    ("36.5", "36^\\circ 5'"),
    ("36^\\circ 30'", "36.3^\\circ"),
    ("\\angle 8 \\cong \\angle 2", "\\angle 8=2"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_the_same(gold: str, answer: str) -> None:
    assert accuracy(gold, answer) == 1


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_not_the_same(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert accuracy(gold, answer) == 0
    assert verifier(answer, f"\\boxed{{{answer}}}")["acc"] == 1


@pytest.mark.parametrize(("gold", "answer"), FIGURES)
def test_named_parts_of_a_figure(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert GeometryVerifier()(gold, f"\\boxed{{{answer}}}")["acc"] == 1
    assert verifier(gold, f"\\boxed{{{answer}}}")["acc"] == 1


@pytest.mark.parametrize(("gold", "answer"), OTHER_FIGURES)
def test_other_values_of_a_figure(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert GeometryVerifier()(gold, f"\\boxed{{{answer}}}")["acc"] == 0
    assert verifier(gold, f"\\boxed{{{answer}}}")["acc"] == 0


def test_values_of_names_have_the_order_of_the_names(verifier: MathVerifier) -> None:
    """Debatable: `y=2, x=1` is (1,2), because x comes before y. Other names keep their written order."""
    assert verifier("(3,2)", "\\boxed{m=3,b=2}")["acc"] == 1
    assert verifier("(2,3)", "\\boxed{m=3,b=2}")["acc"] == 0


def test_a_list_without_names_has_no_order(verifier: MathVerifier) -> None:
    """Debatable: `m=1,n=2` matches the list `2,1`, which asks only for values. A gold with names needs their order."""
    assert verifier("2,1", "\\boxed{m=1,n=2}")["acc"] == 1
    assert verifier("m=1,n=2", "\\boxed{2,1}")["acc"] == 0


def test_the_exact_side_of_an_approximation_decides_for_an_exact_gold(verifier: MathVerifier) -> None:
    """Debatable: 5 may be 4.98 rounded, but the answer 4.98 does not say 5."""
    assert verifier("5", "\\boxed{4.98\\approx5}")["acc"] == 0
    assert verifier("4.98", "\\boxed{4.98\\approx5}")["acc"] == 1


@pytest.mark.parametrize(
    ("text", "name", "pieces"),
    [
        ("x<-1 \\text{ or } x>3", "x", ("(-\\infty,-1)", "(3,\\infty)")),
        ("(1,2)\\cup[3,4]", None, ("(1,2)", "[3,4]")),
        ("x\\in\\mathbb{R}", "x", ("(-\\infty,\\infty)",)),
        ("x\\ne2", "x", ("(-\\infty,2)", "(2,\\infty)")),
        ("x>1\\text{ and }x<4", "x", ("(1,4)",)),
    ],
)
def test_region_of(text: str, name: str | None, pieces: tuple[str, ...]) -> None:
    region = region_of(canonical(text))
    assert region is not None and (region.name, region.pieces) == (name, pieces)


@pytest.mark.parametrize("text", ["5", "x=5", "1,2", "x<y", "x<1\\text{ or }y>2", "x>1\\text{ and }x>2", "\\{x|x\\}"])
def test_no_region(text: str) -> None:
    assert region_of(canonical(text)) is None
