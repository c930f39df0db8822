"""Which answers are the same and which are not, pair by pair, by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from popo_lightning.core.errors import SettingError
from popo_lightning.verifiers.boxed import MAX_ANSWER_CHARACTERS, after_thinking, last_answer_tag, last_boxed
from popo_lightning.verifiers.equality.latex import UnreadableLatexError, canonical
from popo_lightning.verifiers.equality.numbers import read_number
from popo_lightning.verifiers.geometry import GeometryVerifier
from popo_lightning.verifiers.math import MathVerifier

RIGHT = [
    # whole numbers, fractions, decimals
    ("5", "5"),
    ("5", "05"),
    ("5", "5.0"),
    ("5", "+5"),
    ("-5", "−5"),
    ("58,500", "58500"),
    ("12,\\!441,\\!600", "12{,}441{,}600"),
    ("1000000", "1 000 000"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "\\dfrac12"),
    ("\\frac{1}{2}", "2/4"),
    ("-\\frac{3}{4}", "\\frac{-3}{4}"),
    ("-3/2", "-1\\frac{1}{2}"),
    ("1\\frac{4}{5}", "\\frac{9}{5}"),
    (".35625", "0.35625"),
    ("0.35625", "\\frac{57}{160}"),
    ("9.6", "9.6004"),
    ("0.866", "\\frac{\\sqrt{3}}{2}"),
    # scientific notation
    ("3.3e12", "3.3 \\times 10^{12}"),
    ("3.3e12", "3300000000000"),
    ("1e-5", "10^{-5}"),
    ("1e-5", "0.00001"),
    ("8.7 \\times 10^{8}", "8.7e8"),
    ("8.7 \\times 10^{8}", "870,000,000"),
    ("4.4677 \\times 10^{14} Hz", "4.4677 \\cdot 10^{14}"),
    ("2.88 \\times 10^{-19}", "2.88 × 10^-19"),
    # percent, units, degrees, money
    ("67\\%", "67"),
    ("67\\%", "0.67"),
    ("67", "67\\%"),
    ("120^\\circ", "120"),
    ("120", "120°"),
    ("40 \\text{ inches}", "40"),
    ("40 \\text{ inches}", "40\\text{ inch}"),
    ("\\$18.90", "18.90"),
    ("5.4 \\text{ cents}", "5.4"),
    # words and choices
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{east}", "\\text{East}"),
    ("\\text{(E)}", "E"),
    ("52_8", "52_{8}"),
    # expressions
    ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
    ("\\cot x", "\\frac{\\cos x}{\\sin x}"),
    ("2^{1009}", "2 \\cdot 2^{1008}"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("1+\\sqrt{3}i", "1 + i\\sqrt{3}"),
    ("\\frac{n(n+1)}{2}", "\\binom{n+1}{2}"),
    ("2019!", "2019 \\cdot 2018!"),
    ("100p^{\\frac{1}{2}}", "100\\sqrt{p}"),
    ("\\frac{1}{b-a}\\left(e^{-at}-e^{-bt}\\right)", "\\frac{e^{-at}-e^{-bt}}{b-a}"),
    # assignments, equations, inequalities
    ("5", "x = 5"),
    ("x=5", "5"),
    ("f(n)=n^{2}", "n^2"),
    ("5x - 7y + 11z + 4 = 0", "-5x + 7y - 11z - 4 = 0"),
    ("y=10x-4", "10x - 4"),
    ("k \\geqslant 2", "k \\ge 2"),
    ("-2 < x < 3", "(-2, 3)"),
    ("2 \\cdot\\binom{30}{15} = 310235040", "310235040"),
    # sets, tuples, intervals, matrices
    ("1,-2", "-2, 1"),
    ("3, 5, 7", "\\{7, 5, 3\\}"),
    ("\\frac{1}{8} \\text{ and } \\frac{1}{10}", "\\frac{1}{10}, \\frac{1}{8}"),
    ("3 \\pm 2 \\sqrt{2}", "3-2\\sqrt{2}, 3+2\\sqrt{2}"),
    ("x=1, x=2", "2, 1"),
    ("$(6,3),(9,3)$", "(9,3),(6,3)"),
    ("(\\frac{1}{2}, 3)", "(0.5, 3)"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("(-\\infty, 0) \\cup\\{1\\}", "\\{1\\} \\cup (-\\infty, 0)"),
    ("\\begin{pmatrix} 1/2 \\\\ 5 \\end{pmatrix}", "\\begin{pmatrix} \\frac12 \\\\ 5 \\end{pmatrix}"),
    ("\\boxed{7}", "7"),
    ("100,000 \\pi", "100000\\pi"),
    ("2^{100} - 2", "2(2^{99} - 1)"),
    ("\\tan \\theta = 2\\theta", "2\\theta = \\tan\\theta"),
]

WRONG = [
    ("5", "6"),
    ("5", "-5"),
    ("5", "x"),
    ("5", "5=5"),
    ("5", "2+3=5"),
    ("5", "5 \\ge 5"),
    ("5", "x > 5"),
    ("5", "x=6"),
    ("5", "4, 5"),
    ("5", "5, 5"),
    ("5", "(5, 5)"),
    ("55", "5 5"),
    ("10", "5 5"),
    ("x", "5"),
    ("x=5", "y=5"),
    ("x=5", "x"),
    ("x=5", "x=x"),
    ("y=2x", "0=0"),
    ("5x - 7y + 11z + 4 = 0", "0"),
    ("5x - 7y + 11z + 4 = 0", "0=0"),
    ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z = 4"),
    ("\\frac{1}{3}", "0.333333"),
    ("\\frac{1}{3}", "0.3333333333333333"),
    ("\\sqrt{2}", "1.41421356"),
    ("9.6", "9.7"),
    ("9.6", "9.64"),
    ("1234.56", "1234.57"),
    ("1e-5", "1e-6"),
    ("1e-5", "0"),
    ("3.3e12", "3.3e13"),
    ("4.5e33", "4.5 \\cdot e \\cdot 33"),
    ("4.5 e \\cdot 33", "4.5e33"),
    ("4.5e33", "4.5"),
    ("2.88 \\times 10^{-19}", "\\sin(0)"),
    ("e^{-40}", "e^{-60}"),
    ("0", "e^{-60}"),
    ("67\\%", "6.7"),
    ("67\\%", "68\\%"),
    ("40 \\text{ cm}", "40 \\text{ m}"),
    ("\\text{Evelyn}", "evenly"),
    ("\\text{(E)}", "D"),
    ("52_8", "52"),
    ("52_8", "52_9"),
    ("\\frac{aM}{b}", "\\frac{am}{b}"),
    ("\\frac{M+m}{b}", "\\frac{m+m}{b}"),
    ("x' + x", "2x"),
    ("SRAC=LRAC", "LRAS=SRAS"),
    ("2^{1009}", "2^{1010}"),
    ("(a+5)(b+2)", "(a+2)(b+5)"),
    ("\\cot x", "\\tan x"),
    ("3\\sqrt{13}", "13\\sqrt{3}"),
    ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}"),
    ("1,-2", "1,2"),
    ("1,-2", "1"),
    ("3, 5, 7", "3, 5"),
    ("3, 5, 7", "3, 5, 7, 9"),
    ("(1,2)", "(2,1)"),
    ("(2,\\infty)", "[2,\\infty)"),
    ("[0,1]", "(0,1)"),
    ("(-\\infty,0)\\cup(1,2)", "(-\\infty,0)\\cup(1,3)"),
    ("k \\geqslant 2", "k > 2"),
    ("k \\geqslant 2", "2"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "1"),
    ("1:2", "2:1"),
    ("5", "\\text{five}"),
    ("1", "\\text{}"),
    ("2019!", "2018!"),
    ("100,000,000 \\pi", "100,000,000"),
    ("2^{100} - 2", "2^{100} - 3"),
    ("\\tan \\theta = 2\\theta", "\\tan \\theta = 3\\theta"),
    ("(x, y) = (1, 2)", "(x, y) = (2, 1)"),
    ("1", "\\frac{x}{x}"),
    ("(2n-1)!!", "((2n-1)!)!"),
]


@pytest.fixture(scope="module")
def verifier() -> MathVerifier:
    return MathVerifier()


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_equivalent(verifier: MathVerifier, gold: str, answer: str) -> None:
    verifier.check_answer(gold)
    assert verifier(gold, f"So it is \\boxed{{{answer}}}.") == {"score": 1.0, "acc": 1.0, "format": 1.0}


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_not_equivalent(verifier: MathVerifier, gold: str, answer: str) -> None:
    verifier.check_answer(gold)
    assert verifier(gold, f"So it is \\boxed{{{answer}}}.") == {"score": 0.0, "acc": 0.0, "format": 1.0}


BOXLESS = ["5", "The answer is 5.", "$5$", "\\boxed{}", "\\boxed{5", "\\boxedtext{5}", "boxed{5}", ""]


@pytest.mark.parametrize("text", BOXLESS)
def test_without_a_box_nothing_is_right(verifier: MathVerifier, text: str) -> None:
    assert verifier("5", text) == {"score": 0.0, "acc": 0.0, "format": 0.0}


def test_the_last_box_counts(verifier: MathVerifier) -> None:
    assert verifier("5", "\\boxed{4}, no, \\boxed{5}")["acc"] == 1
    assert verifier("5", "\\boxed{5}, no, \\boxed{4}")["acc"] == 0
    assert verifier("5", "\\boxed{5}, or \\boxed{")["acc"] == 0


def test_a_list_holds_alternatives_and_a_string_holds_a_set(verifier: MathVerifier) -> None:
    alternatives = ["0.01", "0.02"]
    verifier.check_answer(alternatives)
    given = ("0.01", "0.02", "0.03", "0.01,0.02")
    assert [verifier(alternatives, f"\\boxed{{{x}}}")["acc"] for x in given] == [1, 1, 0, 0]
    assert [verifier("0.01,0.02", f"\\boxed{{{x}}}")["acc"] for x in ("0.01", "0.02,0.01")] == [0, 1]


def test_format_reward_is_paid_for_a_wrong_answer_in_a_box() -> None:
    verifier = MathVerifier(format_reward=0.2)
    assert verifier("5", "\\boxed{4}") == {"score": 0.2, "acc": 0.0, "format": 1.0}
    assert verifier("5", "\\boxed{5}") == {"score": 1.0, "acc": 1.0, "format": 1.0}
    assert verifier("5", "5") == {"score": 0.0, "acc": 0.0, "format": 0.0}


def test_thinking_is_not_the_answer() -> None:
    free, strict = MathVerifier(), MathVerifier(require_think=True)
    thought, silent = "<think>\\boxed{5}</think> I do not know", "\\boxed{5}"
    answered = "<think>\\boxed{4}</think> \\boxed{5}"
    assert [free("5", text)["acc"] for text in (thought, silent, answered)] == [0, 1, 1]
    assert [strict("5", text)["acc"] for text in (thought, silent, answered)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("\\frac{1}{", "braces"),
        ("3,\\frac{3i\\sqrt{3}}{2", "braces"),
        ("{" * 40 + "}" * 40, "deep"),
        ("1" * (MAX_ANSWER_CHARACTERS + 1), "characters"),
        (None, "string"),
        (True, "string"),
        ({"answer": "5"}, "string"),
        ([], "list of 0"),
        (["5", None], "string"),
        (["5", ""], "empty"),
    ],
)
def test_golds_that_cannot_be_met_are_refused(verifier: MathVerifier, answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verifier.check_answer(answer)
    with pytest.raises(ValueError, match=message):
        GeometryVerifier().check_answer(answer)


def test_numbers_in_json_are_golds_too(verifier: MathVerifier) -> None:
    verifier.check_answer(5)
    assert verifier(5, "\\boxed{5}")["acc"] == 1
    assert verifier(0.5, "\\boxed{\\frac12}")["acc"] == 1


@pytest.mark.parametrize("reward", [1.0, 1.5, -0.1, float("nan"), True, "0.1"])
@pytest.mark.parametrize("kind", [MathVerifier, GeometryVerifier])
def test_format_rewards_that_make_no_sense_are_refused(kind: Any, reward: Any) -> None:
    with pytest.raises(SettingError, match=r"data\.task\.verifier\.format_reward"):
        kind(format_reward=reward)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{5}", "5"),
        ("\\boxed 5", "5"),
        ("\\boxed 5.", "5."),
        ("\\fbox{5}", "5"),
        ("\\boxed{\\frac{1}{2}} so", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed  { x }", "x"),
        ("$\\boxed{a}$ and $\\boxed{b}$", "b"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{a", None),
        ("\\boxed{" + "1" * (MAX_ANSWER_CHARACTERS + 5) + "}", None),
        ("\\boxed", None),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_last_answer_tag() -> None:
    assert last_answer_tag("<answer>1</answer> <answer> 2 </answer>") == "2"
    assert last_answer_tag("<answer>1</answer> <answer>2") == "1"
    assert last_answer_tag("<answer>1 <answer>2</answer>") == "2"
    assert last_answer_tag("<answer>1</answer></answer>") == "1"
    assert last_answer_tag("<answer>(1+2)*3</answer> blah </answer>") == "(1+2)*3"
    assert last_answer_tag(f"<answer>1</answer>{'a' * 3000}</answer>") == "1"
    assert last_answer_tag("<answer>1</answer> blah <answer>") == "1"
    assert last_answer_tag(f"<answer>{'1' * (MAX_ANSWER_CHARACTERS + 1)}</answer>") is None
    assert last_answer_tag("</answer>1<answer>") is None
    assert last_answer_tag("") is None


def test_after_thinking() -> None:
    assert after_thinking("a</think>b</think>c") == "c"
    assert (after_thinking("c"), after_thinking("c", required=True)) == ("c", None)


def test_canonical_spelling() -> None:
    assert canonical("\\dfrac { 15 \\sqrt 2 } 2") == "\\frac{15\\sqrt{2}}{2}"
    assert canonical("\\frac\\sqrt3 2") == "\\frac{\\sqrt{3}}{2}"
    assert canonical("10^12") == canonical("10^{12}")
    assert canonical("{-2}^2") != canonical("-2^2")
    assert canonical("90°") == canonical("90^{\\circ}") == "90^\\circ"
    assert canonical("\\pi r") == "\\pi r"
    for text in ("{", "}", "\\frac{1}", "\\frac", "x^", "\\sqrt[3", "{" * 30 + "}" * 30):
        with pytest.raises(UnreadableLatexError):
            canonical(text)


def test_numbers_are_read_exactly_or_not_at_all() -> None:
    assert read_number("8.70\\times10^{8}").half_unit == 500_000  # type: ignore[union-attr]
    for text in ("1e999", "1e-999", "\\frac{1}{0}", "1/0", "1,23", "1.2.3", "1e", "--1", "nan", "inf", "٣", "9" * 2000):
        assert read_number(text) is None


def test_neither_torch_nor_computer_algebra_is_loaded_to_build_a_verifier() -> None:
    """Computer algebra is loaded when the verifier is unpickled: in a grading process, before the first response."""
    code = (
        "import pickle, sys; from popo_lightning.verifiers.math import MathVerifier;"
        "from popo_lightning.verifiers.geometry import GeometryVerifier;"
        "v = MathVerifier(); v.check_answer('5'); v.check_answer(r'\\frac{\\pi}{4}'); w = GeometryVerifier();"
        "print({'torch', 'sympy', 'math_verify'} & set(sys.modules));"
        "pickle.loads(pickle.dumps(w)); print('sympy' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\nTrue False\n"
