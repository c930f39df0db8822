"""The arithmetic task: its verifier, its problems, and the split into train and held-out."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from popo_lightning.core.errors import SettingError
from popo_lightning.toys.arithmetic import KINDS, Arithmetic, verify_result

SMALL = {"largest_number": 9, "held_out_per_kind": 5}


@pytest.mark.parametrize(
    ("text", "score", "form"),
    [
        ("18 - 12 = 6", 1, 1),
        ("18 - 12 = 6.", 1, 1),
        ("18-12=6", 1, 1),
        ("= 6", 1, 1),
        ("18 - 12 =   6\n\nThat is the result of 18 and 12", 1, 1),
        ("18 - 12 = 7, no: 18 - 12 = 6", 1, 1),  # the last one counts
        ("18 - 12 = 6 = 7", 0, 1),
        ("18 - 12 = 66", 0, 1),
        ("18 - 12 = -6", 0, 1),
        ("18 - 12 = 06", 1, 1),
        ("6", 0, 0),
        ("18 - 12 is 6", 0, 0),
        ("18 - 12 = six", 0, 0),
        ("18 - 12 =\n6", 0, 0),
        ("18 - 12 = ６", 0, 0),  # fullwidth
        ("18 - 12 = +6", 0, 0),
        ("= 0000000006", 0, 0),  # ten digits are not an answer, and neither are nine of them
        ("= 6000000000", 0, 0),
        ("", 0, 0),
        ("= 6" + " " * 1998, 0, 0),
    ],
)
def test_verdicts(text: str, score: int, form: int) -> None:
    assert verify_result(6, text) == {"score": score, "acc": score, "format": form}


def test_a_negative_answer_is_read_with_its_sign() -> None:
    assert verify_result(-6, "12 - 18 = -6")["acc"] == 1
    assert verify_result(-6, "12 - 18 = 6")["acc"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_an_independent_reckoning(kind: str) -> None:
    task = Arithmetic([kind], **SMALL)
    problems = [*task.train_problems(), *task.benchmarks()["arithmetic"]]
    assert len(problems) > 30
    for problem in problems:
        assert re.fullmatch(r"[2-9]( [-+*] [2-9]){1,2}", problem.id)
        assert problem.answer == eval(problem.id) >= 0  # the test's own text, matched above
        assert problem.id.replace(" ", "").translate(str.maketrans("23456789", "a" * 8)) == re.sub("[bc]", "a", kind)
        assert problem.info == {"level": kind}


def test_the_example_is_right_and_the_question_last() -> None:
    for problem in Arithmetic(**SMALL).train_problems():
        assert isinstance(problem.prompt, list)
        question, example, asked = problem.prompt
        assert [m["role"] for m in problem.prompt] == ["user", "assistant", "user"]
        assert verify_result(eval(question["content"]), example["content"])["acc"] == 1
        assert example["content"].startswith(question["content"]) and asked["content"] == problem.id


def test_the_system_message_is_a_setting() -> None:
    """Some templates add their own if there is none, and some refuse any."""
    for system in ("", "Be brief."):
        (first, *rest), plain = (Arithmetic(system=s, **SMALL).train_problems()[0].prompt for s in (system, None))
        assert first == {"role": "system", "content": system} and rest == plain


def turned(id: str) -> str:
    """Returns the problem with its first two terms in the other order."""
    first, operation, second, *rest = id.split(" ")
    return " ".join([second, operation, first, *rest])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_held_out_is_trained_on_in_any_order(kind: str) -> None:
    task = Arithmetic([kind], held_out_per_kind=5)
    train = {problem.id for problem in task.train_problems()}
    held_out = {problem.id for problem in task.benchmarks()["arithmetic"]}
    assert train and held_out and not train & held_out
    if kind != "a-b":
        assert not train & {turned(id) for id in held_out}
    if kind == "a+b+c":
        assert not train & {" ".join(turned(id).split(" ")[::-1]) for id in held_out}
        sorted_terms = [{tuple(sorted(id.split(" + "))) for id in ids} for ids in (train, held_out)]
        assert not sorted_terms[0] & sorted_terms[1]


def test_every_problem_is_on_one_side_and_the_share_is_kept() -> None:
    settings: dict[str, Any] = {"largest_number": 41, "problems_per_kind": 10_000, "held_out_share": 0.25}
    task = Arithmetic(["a+b"], held_out_per_kind=1, **settings)
    assert len(task.train_problems()) == pytest.approx(1600 * 0.75, rel=0.1)
    wider = Arithmetic(["a+b"], held_out_per_kind=300, **settings)
    assert wider.train_problems() == task.train_problems()
    everything = {f"{a} + {b}" for a in range(2, 42) for b in range(2, 42)}
    left = everything - {problem.id for problem in task.train_problems()}
    assert {problem.id for problem in wider.benchmarks()["arithmetic"]} <= left


def test_kinds_are_balanced_and_mixed() -> None:
    task = Arithmetic(["a-b", "a*b"], problems_per_kind=40, held_out_per_kind=7)
    for problems, count in ((task.train_problems(), 40), (task.benchmarks()["arithmetic"], 7)):
        levels = [problem.info["level"] for problem in problems]
        assert levels.count("a-b") == levels.count("a*b") == count
        assert levels != sorted(levels) and levels != sorted(levels, reverse=True)


def test_a_process_of_its_own_makes_the_same_problems_without_torch() -> None:
    code = (
        "import sys; from popo_lightning.toys.arithmetic import Arithmetic; t = Arithmetic();"
        "assert 'torch' not in sys.modules;"
        "print([p.id for p in [*t.train_problems(), *t.benchmarks()['arithmetic']]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    task = Arithmetic()
    assert done.stdout.strip() == str([p.id for p in [*task.train_problems(), *task.benchmarks()["arithmetic"]]])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"kinds": []}, "kinds"),
        ({"kinds": ["a/b"]}, "kinds"),
        ({"kinds": ["a+b", "a+b"]}, "kinds"),
        ({"smallest_number": 9, "largest_number": 8}, "largest_number"),
        ({"smallest_number": -1}, "smallest_number"),
        ({"largest_number": 100}, "largest_number"),
        ({"problems_per_kind": 0}, "problems_per_kind"),
        ({"held_out_per_kind": 0}, "held_out_per_kind"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"held_out_share": 0.0}, "held_out_share"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(SettingError, match=rf"^data\.task\..*{names}") as refused:
        Arithmetic(**settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("settings", [{"held_out_per_kind": 500}, {"smallest_number": 5, "largest_number": 5}])
def test_too_few_problems_are_one_sentence(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"^data\.task\.held_out_per_kind is \d+ but 'a\+b' has"):
        Arithmetic(**settings).train_problems()
