"""Every gold of the real data sets is right as an answer, and wrong answers made from it are wrong.

Exceptions are listed by the row's id, with the reason.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from helpers.places import SHARED
from math_verify import parse, verify

from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.countdown import CountdownVerifier
from popo_lightning.verifiers.geometry import GeometryVerifier
from popo_lightning.verifiers.math import MathVerifier

DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not on this machine")

EVALUATION = ["aime24", "aime25", "amc23", "amc22_23", "math500", "minerva", "olympiadbench", "gsm8k_test"]
TRAINING = ["gsm8k_train", "math_train", "aime_train", "deepscaler_train", "dsr_sub_traces"]
GEOMETRY = ["geometry3k_train", "geometry3k_val", "geometry3k_test"]
PLANNING = ["countdown34_train", "countdown34_mopps_test", "countdown34_tinyzero_test", "countdown_d1_cd3"]
SAMPLE = 250

MALFORMED: dict[str, str] = {
    "dsr-11ea9e35be": "the last brace is missing",
    "dsr-a81943e3a9": "the last brace is missing",
    "dsrsub-1187": "the last brace is missing",
}
STILL_RIGHT: dict[str, str] = {
    "minerva-063": "15000 without a unit is acceptable too, and then any unit is",
    "dsr-0a5a213c0e": "the binomial coefficient is symmetric",
    "dsr-ce05cc1b48": "the binomial coefficient is symmetric",
    "dsr-f26869edfd": "the gold has a box of its own, at its end, and what was changed stands before it",
}


@cache
def rows(path: str) -> list[dict[str, Any]]:
    with (DATA / path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def gold(row: dict[str, Any]) -> Any:
    return row.get("answers_all", row["answer"])


def check_golds(verifier: Verifier, chosen: list[dict[str, Any]]) -> None:
    for row in chosen:
        if row["id"] in MALFORMED:
            with pytest.raises(ValueError, match="cannot be read"):
                verifier.check_answer(gold(row))
            continue
        verifier.check_answer(gold(row))
        for answer in row.get("answers_all", [row["answer"]]):
            boxed = answer if r"\boxed" in answer else f"\\boxed{{{answer}}}"
            assert verifier(gold(row), f"<think>so</think> {boxed}")["acc"] == 1, (row["id"], answer)


def wrong_answers(answer: str) -> Iterator[str]:
    """Yields the answer with the last number plus one, two digits swapped, the sign changed, or a factor dropped."""
    numbers = list(re.finditer(r"\d+", answer))
    if numbers:
        last = numbers[-1]
        yield answer[: last.start()] + str(int(last[0]) + 1) + answer[last.end() :]
    for number in numbers:
        swapped = number[0][1:2] + number[0][:1] + number[0][2:]
        if swapped != number[0]:
            yield answer[: number.start()] + swapped + answer[number.end() :]
            break
    if re.fullmatch(r"-?(?:[\d.]+|\\frac\{\d+\}\{\d+\})", answer) and set(answer) - set("-0."):
        yield answer.removeprefix("-") if answer.startswith("-") else f"-{answer}"
    factor = re.search(r"\\sqrt\s*\{[^{}]*\}|\\pi", answer)
    if factor and factor[0] != answer.strip("$ "):
        yield answer[: factor.start()] + answer[factor.end() :]


def another_grader_takes(answer: str, other: str) -> bool:
    """Returns whether math-verify, which reads and compares in its own way, accepts one row's answer for another's."""
    read = [parse(f"${text.strip('$')}$", parsing_timeout=None) for text in (answer, other)]
    return bool(verify(*read, timeout_seconds=None) or verify(*reversed(read), timeout_seconds=None))


def spelling(answer: str) -> str:
    """Returns a rough key that is equal for two rows with the same answer, however it is written."""
    answer = re.sub(r"\.0+$", "", answer)
    return re.sub(r"\\text\s*\{[^}]*\}|\\d?t?frac|\\left|\\right|[^0-9A-Za-z+\-/]|^[a-z]=", "", answer.replace(" ", ""))


def check_perturbed(verifier: Verifier, chosen: list[dict[str, Any]], least: int) -> None:
    """Checks that perturbed answers are wrong, and so are the answers of two other rows unless they are the same."""
    rng = random.Random(11)
    tried, wrongly_right = 0, []
    for row in chosen:
        if row["id"] in MALFORMED:
            continue
        others = [
            other["answer"] for other in rng.sample(chosen, 2) if spelling(other["answer"]) != spelling(row["answer"])
        ]
        for answer in [*wrong_answers(row["answer"]), *others]:
            tried += 1
            right = verifier(gold(row), f"<think>so</think> \\boxed{{{answer}}}")["acc"]
            equal = answer in others and right and another_grader_takes(row["answer"], answer)
            if right and not equal and row["id"] not in STILL_RIGHT:
                wrongly_right.append((row["id"], row["answer"], answer))
    assert not wrongly_right
    assert tried >= least


def sample(path: str, size: int = SAMPLE) -> list[dict[str, Any]]:
    found = rows(path)
    return random.Random(5).sample(found, min(size, len(found)))


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_golds(name: str) -> None:
    check_golds(MathVerifier(), rows(f"math/{name}.jsonl"))
    check_perturbed(MathVerifier(), sample(f"math/{name}.jsonl"), least=50)


@pytest.mark.parametrize("name", TRAINING)
def test_training_golds(name: str) -> None:
    check_golds(MathVerifier(), rows(f"math/{name}.jsonl"))
    check_perturbed(MathVerifier(), sample(f"math/{name}.jsonl"), least=500)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_third_of_the_training_golds_perturbed(name: str) -> None:
    check_perturbed(MathVerifier(), rows(f"math/{name}.jsonl")[::3], least=1_000)


@pytest.mark.nightly
@pytest.mark.parametrize("name", TRAINING)
def test_training_golds_perturbed(name: str) -> None:
    check_perturbed(MathVerifier(), rows(f"math/{name}.jsonl"), least=3_000)


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_golds(name: str) -> None:
    check_golds(GeometryVerifier(), rows(f"geometry/{name}.jsonl"))
    check_perturbed(GeometryVerifier(), sample(f"geometry/{name}.jsonl"), least=400)


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_choices(name: str) -> None:
    """Of the four choices as printed only the gold one is right, and the letters are not."""
    verifier = GeometryVerifier()
    for row in sample(f"geometry/{name}.jsonl", 60):
        right = {choice for choice in row["choices"] if verifier(gold(row), f"\\boxed{{{choice}}}")["acc"]}
        assert right == {row["answer"]}, row["id"]
        assert not any(verifier(gold(row), f"\\boxed{{{letter}}}")["acc"] for letter in "ABCD")


@pytest.mark.parametrize("name", PLANNING)
def test_countdown_solutions(name: str) -> None:
    verifier = CountdownVerifier()
    for row in rows(f"planning/{name}.jsonl"):
        answer = {"numbers": row["numbers"], "target": row["target"]}
        verifier.check_answer(answer)
        solution = row["example_solution"]
        assert verifier(answer, f"<answer>{solution}</answer>")["acc"] == 1, row["id"]
        for wrong in perturbed_expressions(solution):
            assert verifier(answer, f"<answer>{wrong}</answer>")["acc"] == 0, (row["id"], wrong)
        for moved in (row["target"] + 1, -row["target"]):
            assert verifier({**answer, "target": moved}, f"<answer>{solution}</answer>")["acc"] == 0, row["id"]


def perturbed_expressions(solution: str) -> Iterator[str]:
    first = re.search(r"\d+", solution)
    assert first is not None
    yield f"{solution[: first.start()]}{int(first[0]) + 1}{solution[first.end() :]}"
    yield f"{solution} + {first[0]}"
    yield f"{solution} = "
    yield re.sub(r"\d+", "", solution, count=1)


def test_countdown_steps_as_expressions() -> None:
    verifier = CountdownVerifier()
    for row in rows("planning/countdown_sos4.jsonl"):
        answer = {"numbers": row["numbers"], "target": row["target"]}
        verifier.check_answer(answer)
        expression = one_expression(row["numbers"], row["example_steps"])
        assert verifier(answer, f"<think>so</think><answer>{expression}</answer>")["acc"] == 1, row["id"]


def one_expression(numbers: list[int], steps: list[str]) -> str:
    at_hand = [(number, str(number)) for number in numbers]
    for step in steps:
        left, operation, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
        taken = []
        for number in (int(left), int(right)):
            taken.append(next(pair for pair in at_hand if pair[0] == number))
            at_hand.remove(taken[-1])
        at_hand.append((int(result), f"({taken[0][1]} {operation} {taken[1][1]})"))
    assert len(at_hand) == 1
    return at_hand[0][1]
