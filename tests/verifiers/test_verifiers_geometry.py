"""The geometry verifier: answers about figures, units, and the reward of MoPPS."""

from __future__ import annotations

import pytest

from popo_lightning.verifiers.geometry import GeometryVerifier

RIGHT = [
    ("5 \\sqrt { 3 }", "5\\sqrt{3}"),
    ("5 \\sqrt { 3 }", "5\\sqrt3"),
    ("5 \\sqrt { 3 }", "\\sqrt{75}"),
    ("5 \\sqrt { 3 }", "x = 5\\sqrt{3}"),
    ("5 \\sqrt { 3 }", "5\\sqrt{3} \\text{ cm}"),
    ("5 \\sqrt { 3 }", "5\\sqrt{3}\\,\\mathrm{cm}"),
    ("\\frac { \\pi } { 4 }", "\\pi/4"),
    ("\\frac { 15 \\sqrt 2 } { 2 }", "\\frac{15}{2}\\sqrt{2}"),
    ("\\sqrt { 26 } / 26", "\\frac{\\sqrt{26}}{26}"),
    ("\\sqrt { 26 } / 26", "\\frac{1}{\\sqrt{26}}"),
    ("\\angle 8 \\cong \\angle 2", "\\angle 8 \\cong \\angle 2"),
    ("\\angle 8 \\cong \\angle 2", "∠8 ≅ ∠2"),
    ("A D and B E", "AD and BE"),
    ("A D and B E", "AD \\text{ and } BE"),
    ("angles 2,3, 6, and 7", "angles 2, 3, 6, and 7"),
    ("24", "24"),
    ("24", "24.0"),
    ("24", "24 units"),
    ("24", "24 \\text{ square units}"),
    ("24", "24\\text{ cm}^2"),
    ("24", "24 cm"),
    ("24", "24 square inches"),
    ("24", "24\\text{ ft}^{2}"),
    ("120", "120^\\circ"),
    ("120", "120^{\\circ}"),
    ("120", "120°"),
    ("120", "120 degrees"),
    ("120", "m\\angle ABC = 120"),
    ("120", "\\angle ABC = 120^\\circ"),
    ("20 y^2 - 10 y", "10y(2y-1)"),
    ("- 1", "-1"),
    ("12.5", "\\frac{25}{2}"),
    ("12 \\pi", "12\\pi \\text{ m}"),
    ("24 + 4 \\sqrt { 2 } + 4 \\sqrt { 3 }", "4(6+\\sqrt2+\\sqrt3)"),
]

WRONG = [
    ("5 \\sqrt { 3 }", "3 \\sqrt { 5 }"),
    ("5 \\sqrt { 3 }", "8.66"),
    ("5 \\sqrt { 3 }", "5"),
    ("24", "C"),
    ("24", "(C)"),
    ("24", "C. 24"),
    ("24", "\\text{C}"),
    ("24", "42"),
    ("24", "24, 25"),
    ("24", "24x"),
    ("24", "24 = 24"),
    ("24", "cm"),
    ("120", "60^\\circ"),
    ("120", "1.20"),
    ("120", "120\\pi"),
    ("\\angle 8 \\cong \\angle 2", "\\angle 8 \\cong \\angle 3"),
    ("\\angle 8 \\cong \\angle 2", "8"),
    ("A D and B E", "AD and BC"),
    ("A D and B E", "DABE"),
    ("angles 2,3, 6, and 7", "angles 2, 3, and 6"),
    ("angles 2,3, 6, and 7", "angles 2, 3, 6, and 8"),
    ("\\frac { \\pi } { 4 }", "45"),
    ("\\frac { \\pi } { 4 }", "0.785398"),
    ("12.5", "12"),
    ("20 y^2 - 10 y", "20y - 10"),
    ("14 \\pi", "14"),
]


@pytest.fixture(scope="module")
def verifier() -> GeometryVerifier:
    return GeometryVerifier()


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_equivalent(verifier: GeometryVerifier, gold: str, answer: str) -> None:
    verifier.check_answer(gold)
    text = f"<think>As $ABC$ is right ...</think> \\boxed{{{answer}}}"
    assert verifier(gold, text) == {"score": 1.0, "acc": 1.0, "format": 1.0}


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_not_equivalent(verifier: GeometryVerifier, gold: str, answer: str) -> None:
    text = f"<think>As $ABC$ is right ...</think> \\boxed{{{answer}}}"
    assert verifier(gold, text) == {"score": 0.1, "acc": 0.0, "format": 1.0}


@pytest.mark.parametrize(
    ("text", "score", "acc", "format"),
    [
        ("<think>a</think> \\boxed{24}", 1.0, 1.0, 1.0),
        ("\\boxed{24}", 1.0, 1.0, 0.0),
        ("<think>a</think> \\boxed{25}", 0.1, 0.0, 1.0),
        ("\\boxed{25}", 0.0, 0.0, 0.0),
        ("a</think> \\boxed{25}", 0.0, 0.0, 0.0),
        ("<think>\\boxed{24}</think> 24", 0.0, 0.0, 0.0),
        ("<think>a</think> 24", 0.0, 0.0, 0.0),
        ("24", 0.0, 0.0, 0.0),
    ],
)
def test_right_scores_1_and_only_a_wrong_answer_needs_the_format(
    verifier: GeometryVerifier, text: str, score: float, acc: float, format: float
) -> None:
    assert verifier("24", text) == {"score": score, "acc": acc, "format": format}
