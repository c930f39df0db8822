"""The Countdown verifier, compared with answers made by hand and with Python itself."""

from __future__ import annotations

import random
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest

from popo_lightning.core.errors import SettingError
from popo_lightning.verifiers.countdown import CountdownVerifier, value_of

RIGHT = [
    ([44, 19, 35], 98, "35 + (44 + 19)"),
    ([44, 19, 35], 98, "44+19+35"),
    ([44, 19, 35], 98, "((44)+(19))+(35)"),
    ([44, 19, 35], 98, " 44 +\n19 + 35 "),
    ([63, 95, 96], 64, "96 + (63 - 95)"),
    ([63, 95, 96], 64, "-95 + 96 + 63"),
    ([63, 95, 96], 64, "96 - (95 - 63)"),
    ([63, 95, 96], 64, "96 - -(63 - 95)"),
    ([3, 8, 3, 8], 24, "8 / (3 - 8 / 3)"),
    ([1, 5, 5, 5], 24, "5 * (5 - 1 / 5)"),
    ([1, 1, 11, 45], 68, "(1+1)*(45-11)"),
    ([2, 3], -1, "2-3"),
    ([2, 3], 6, "+2*+3"),
    ([7], 7, "7"),
    ([0, 5], 5, "0+5"),
    ([6, 2, 3], 1, "6/2/3"),
    ([6, 2, 3], 1, "6-2-3"),
    ([2, 3, 4], 14, "2+3*4"),
    ([2, 3, 4], 20, "(2+3)*4"),
    ([2, 3, 4], -10, "2-3*4"),
    ([2, 3], 6, "2×3"),
    ([2, 3], 6, "2·3"),
    ([6, 3], 2, "6÷3"),
    ([6, 3], 3, "6 − 3"),
    ([6, 3, 4, 2], 10, "6 \\div 3 \\times 4 + 2"),
    ([6, 3], 18, "6\\cdot3"),
]
WRONG = [
    ([44, 19, 35], 98, "44 + 19"),
    ([44, 19, 35], 98, "98"),
    ([44, 19, 35], 98, "44 + 19 + 35 + 0"),
    ([44, 19, 35], 98, "44 + 19 + 35 = 98"),
    ([44, 19, 35], 98, "98 = 44 + 19 + 35"),
    ([44, 19, 35], 98, "44 + 19 - 35"),
    ([44, 19, 35], 98, "44 + 19 + 35)"),
    ([44, 19, 35], 98, "(44 + 19 + 35"),
    ([44, 19, 35], 98, "44 + 19 35"),
    ([44, 19, 35], 98, "44 + 19 +"),
    ([44, 19, 35], 98, "* 44 + 19 + 35"),
    ([44, 19, 35], 98, ""),
    ([44, 19, 35], 98, "()"),
    ([44, 19, 35], 98, "44 + 19 + 3 5"),
    ([44, 19, 35], 98, "44 + 19 + 035"),
    ([44, 19, 35], 98, "44 + 19 + 35.0"),
    ([44, 19, 35], 98, "44 + 19 + 35 # right"),
    ([44, 19, 35], 98, "٤٤ + 19 + 35"),
    ([1, 2, 3], 9, "(1+2)**3 "),
    ([2, 3], 8, "2**3"),
    ([7, 2], 3, "7//2"),
    ([1, 5, 3], 4.5, "1.5*3"),
    ([1, 5], 1, "1.5"),
    ([2, 3], 23, "23"),
    ([2, 3], 6, "(2)(3)"),
    ([2, 3], 6, "2\\timesx3"),
    ([2, 3], 6, "2××3"),
    ([6, 3], 2, "3÷6"),
    ([2, 3], 6, "2 * 3; 0"),
    ([2, 0], 2, "2/0"),
    ([5, 5], 5, "5"),
    ([5, 5, 1], 1, "1/(5-5)"),
    ([10, 3, 3], 3, "10/3"),
    ([10, 3, 1], 3, "10/3*1"),
    ([3, 1, 3], 1, "1/3*3 + 1e-9"),
    ([2, 3], 5, "+".join(["(" * 60 + "2" + ")" * 60, "3"])),
    ([2, 3], 5, "2+3" + " " * 400 + "\t" * 200 + "+"),
    ([1, 2], 3, "__import__('os').system('true') or 1+2"),
]


@pytest.fixture(scope="module")
def verifier() -> CountdownVerifier:
    return CountdownVerifier()


@pytest.mark.parametrize(("numbers", "target", "expression"), RIGHT)
def test_right(verifier: CountdownVerifier, numbers: list[int], target: int, expression: str) -> None:
    answer = {"numbers": numbers, "target": target}
    verifier.check_answer(answer)
    text = f"<think>Let me try.</think>\n<answer>{expression}</answer>"
    assert verifier(answer, text) == {"score": 1.0, "acc": 1.0, "format": 1.0}


@pytest.mark.parametrize(("numbers", "target", "expression"), WRONG)
def test_wrong(verifier: CountdownVerifier, numbers: list[int], target: int, expression: str) -> None:
    answer = {"numbers": numbers, "target": target}
    assert verifier(answer, f"<answer>{expression}</answer>") == {"score": 0.1, "acc": 0.0, "format": 1.0}


TAGLESS = ["", "2+3", "<answer>2+3", "2+3</answer>", "</answer>2+3<answer>", "<ANSWER>2+3</ANSWER>"]


@pytest.mark.parametrize("text", TAGLESS)
def test_without_the_tag_nothing_is_right(verifier: CountdownVerifier, text: str) -> None:
    assert verifier({"numbers": [2, 3], "target": 5}, text) == {"score": 0.0, "acc": 0.0, "format": 0.0}


def test_the_last_tag_counts(verifier: CountdownVerifier) -> None:
    answer = {"numbers": [2, 3], "target": 5}
    assert verifier(answer, "<answer>2*3</answer><answer>2+3</answer>")["acc"] == 1
    assert verifier(answer, "<answer>2+3</answer><answer>2*3</answer>")["acc"] == 0


def test_random_expressions_have_the_value_that_python_gives() -> None:
    rng = random.Random(7)

    def write(numbers: list[int], wrap: bool) -> str:
        if len(numbers) == 1:
            number = f"Fraction({numbers[0]})" if wrap else str(numbers[0])
            return rng_sign + number if (rng_sign := rng.choice(["", "", "-"])) == "" else f"({rng_sign}{number})"
        cut = rng.randrange(1, len(numbers))
        left, right = write(numbers[:cut], wrap), write(numbers[cut:], wrap)
        return rng.choice(["({}{}{})", "{}{}{}", "-({}{}{})"]).format(left, rng.choice("+-*/"), right)

    compared = 0
    for _ in range(1500):
        numbers = [rng.randrange(10, 100) for _ in range(rng.randrange(1, 7))]
        expression = write(numbers, False)
        exact = "".join(f"Fraction({token})" if token.isdigit() else token for token in _tokens(expression))
        try:
            expected = Fraction(eval(exact, {"Fraction": Fraction}))  # the test's own expression, not a model's
        except ZeroDivisionError:
            continue
        assert value_of(expression, numbers) == expected, expression
        compared += 1
    assert compared > 1400


def _tokens(expression: str) -> list[str]:
    tokens: list[str] = []
    for character in expression:
        if character.isdigit() and tokens and tokens[-1].isdigit():
            tokens[-1] += character
        else:
            tokens.append(character)
    return tokens


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("98", "numbers"),
        ({"numbers": [1, 2]}, "target"),
        ({"numbers": [], "target": 1}, "list of 1 to"),
        ({"numbers": [1] * 13, "target": 1}, "list of 1 to"),
        ({"numbers": "123", "target": 1}, "list of 1 to"),
        ({"numbers": [1, "2"], "target": 3}, "contain 2"),
        ({"numbers": [1, -2], "target": 3}, "contain -2"),
        ({"numbers": [1, True], "target": 3}, "contain True"),
        ({"numbers": [1, 10**9], "target": 3}, "whole number"),
        ({"numbers": [1, 2], "target": 3.5}, "target"),
        ({"numbers": [1, 2], "target": "3"}, "target"),
    ],
)
def test_golds_that_make_no_sense_are_refused(verifier: CountdownVerifier, answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verifier.check_answer(answer)


@pytest.mark.parametrize("reward", [1.0, -0.1, float("nan"), True, "0.1"])
def test_format_rewards_that_make_no_sense_are_refused(reward: Any) -> None:
    with pytest.raises(SettingError, match=r"data\.task\.verifier\.format_reward"):
        CountdownVerifier(format_reward=reward)


def test_a_long_run_of_signs_is_read_at_any_depth_of_calls() -> None:
    """The reader calls itself for each sign, so it gives up where Python's stack ends, and raises nothing."""

    def deeper(calls: int) -> Fraction | None:
        return value_of("-" * 498 + "1", [1]) if calls == 0 else deeper(calls - 1)

    assert deeper(0) == 1 and deeper(sys.getrecursionlimit() - 250) is None


def test_a_worker_has_little_to_import() -> None:
    code = (
        "import sys; import popo_lightning.verifiers.countdown;"
        "print({'torch', 'sympy', 'math_verify', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
