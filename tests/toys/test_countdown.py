"""The embedded task: its verifier, its solver, and the split into train and held-out."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations_with_replacement, permutations, product

import pytest

from popo_lightning.core.errors import SettingError
from popo_lightning.toys.countdown import CountdownSteps, solutions, verify_steps, write_steps

ASKED = {"numbers": [2, 7, 5], "target": 25}  # 7 - 2 = 5, then 5 * 5
OPERATIONS = "+-*/"


def grade(text: str, answer: dict[str, object] = ASKED) -> tuple[float, float]:
    parts = verify_steps(answer, text)
    assert set(parts) == {"score", "acc", "format"} and parts["acc"] == parts["score"]
    assert all(type(value) is float for value in parts.values())
    return parts["score"], parts["format"]


@pytest.mark.parametrize(
    ("text", "score", "form"),
    [
        ("7-2=5;5*5=25", 1, 1),
        ("  7-2=5;5*5=25\n", 1, 1),
        ("7-5=2;2*2=4", 0, 1),  # well-formed, misses the target
        ("7+2=9;9-5=4", 0, 1),
        ("2+7=9;9+5=14", 0, 1),  # the smaller number may be first
        ("7-2=6;6*5=30", 0, 0),  # wrong arithmetic
        ("7-2=5;5*5=26", 0, 0),
        ("7-2=5;5*7=35", 0, 0),  # 7 used twice
        ("7*7=49;49-5=44;44-2=42", 0, 0),
        ("5*5=25;7-2=5", 0, 0),  # only one 5, used twice
        ("7-2=5", 0, 0),  # 5 not used
        ("8-2=6;6*5=30", 0, 0),  # 8 not given
        ("7-2=5;5*5=25;25+0=25", 0, 0),  # 0 not given
        ("7-2=5;5*5=25;", 0, 0),
        (";7-2=5;5*5=25", 0, 0),
        ("7-2=5;;5*5=25", 0, 0),
        ("", 0, 0),
        ("   \n", 0, 0),
        ("25", 0, 0),
        ("5*(7-2)=25", 0, 0),
        ("(7-2=5);5*5=25", 0, 0),
        ("7-2=5; 5*5=25", 0, 0),
        ("7 -2=5;5*5=25", 0, 0),
        ("7-2=5\n;5*5=25", 0, 0),
        ("7-2=5,5*5=25", 0, 0),
        ("The answer: 7-2=5;5*5=25", 0, 0),
        ("7-2=5;5*5=25 is right", 0, 0),
        ("７-2=5;5*5=25", 0, 0),  # fullwidth seven
        ("٧-٢=٥;٥*٥=٢٥", 0, 0),  # Arabic-Indic digits
        ("²+7=9;9-5=4", 0, 0),
        ("7−2=5;5*5=25", 0, 0),  # a character that only looks like a minus sign
        ("2-7=-5;-5*5=-25", 0, 0),
        ("7.0-2=5;5*5=25", 0, 0),
        ("7-2==5;5*5=25", 0, 0),
        ("7-2=5;5**5=25", 0, 0),
        ("9" * 350 + "-2=5", 0, 0),
        ("7**7=" + "9" * 300, 0, 0),
    ],
)
def test_verdicts(text: str, score: int, form: int) -> None:
    assert grade(text) == (score, form)


def test_a_number_that_comes_twice_can_be_used_twice() -> None:
    assert grade("5*5=25", {"numbers": [5, 5], "target": 25}) == (1, 1)
    assert grade("5*5=25", {"numbers": [5, 4], "target": 25}) == (0, 0)
    assert grade("5+5=10;10-2=8", {"numbers": [5, 2], "target": 8}) == (0, 0)
    assert grade("2*2=4;4*2=8", {"numbers": [2, 2, 2], "target": 8}) == (1, 1)


def test_division_is_exact_and_never_by_zero() -> None:
    assert grade("8/2=4", {"numbers": [2, 8], "target": 4}) == (1, 1)
    assert grade("2/8=0", {"numbers": [2, 8], "target": 0}) == (0, 0)
    assert grade("7/2=3", {"numbers": [2, 7], "target": 3}) == (0, 0)
    assert grade("1/0=0", {"numbers": [1, 0], "target": 0}) == (0, 0)
    assert grade("1/0=1", {"numbers": [1, 0], "target": 1}) == (0, 0)
    assert grade("2-2=0;5/0=0", {"numbers": [2, 2, 5], "target": 0}) == (0, 0)
    assert grade("2-2=0;0/5=0", {"numbers": [2, 2, 5], "target": 0}) == (1, 1)


def test_numbers_have_at_most_six_digits() -> None:
    assert grade("999998+1=999999", {"numbers": [1, 999998], "target": 999999}) == (1, 1)
    assert grade("999999+1=1000000", {"numbers": [1, 999999], "target": 1000000}) == (0, 0)
    assert grade("1000000-1=999999", {"numbers": [1, 1000000], "target": 999999}) == (0, 0)


def test_at_most_400_characters_are_read() -> None:
    right = "7-2=5;5*5=25"
    assert grade(right.ljust(400)) == (1, 1)
    assert grade(right.ljust(401)) == (0, 0)
    began = time.process_time()  # other processes do not count
    for text in ("1+" * 500_000, " " * 1_000_000, "7-2=5;" * 170_000, "9" * 1_000_000, right + "\0" * 1_000_000):
        assert grade(text) == (0, 0)
    assert time.process_time() - began < 0.5


def _by_the_rules(answer: dict[str, list[int]], text: str) -> tuple[float, float]:
    """Applies the verifier's rules without regular expressions and fractions."""
    hand = Counter(answer["numbers"])
    for step in text.strip().split(";"):
        if set(step) - set("0123456789+-*/="):
            return 0.0, 0.0
        sides = step.split("=")
        signs = [c for c in sides[0] if c in OPERATIONS]
        if len(sides) != 2 or len(signs) != 1:
            return 0.0, 0.0
        numbers = [*sides[0].split(signs[0]), sides[1]]
        if not all(n.isdigit() and len(n) <= 6 for n in numbers):
            return 0.0, 0.0
        left, right, result = map(int, numbers)
        if not hand >= Counter([left, right]) or not _true(left, signs[0], right, result):
            return 0.0, 0.0
        hand -= Counter([left, right])
        hand[result] += 1
    return (0.0, 0.0) if hand.total() != 1 else (float(hand[answer["target"]] == 1), 1.0)


def _true(left: int, sign: str, right: int, result: int) -> bool:
    if sign == "/":
        return right != 0 and left == right * result
    return {"+": left + right, "-": left - right, "*": left * right}[sign] == result


def test_random_texts_never_raise_and_get_zero_or_one() -> None:
    draw = random.Random(0)
    alphabet = "0123456789+-*/=;,>:() \n\t\0٣²x\ud800é"
    problems = CountdownSteps(operations=OPERATIONS).train_problems()
    verdicts: Counter[tuple[float, float]] = Counter()
    for i in range(2000):
        answer = draw.choice(problems).answer
        if i % 2:
            text = "".join(draw.choices(alphabet, k=draw.randrange(40)))
        else:  # a solution with up to two characters changed
            symbols = list(write_steps(draw.choice(list(solutions(answer["numbers"], OPERATIONS)))))
            for _ in range(draw.randrange(3)):
                place = draw.randrange(len(symbols))
                symbols[place : place + draw.randrange(2)] = draw.choice("0123456789+-*/=;")
            text = "".join(symbols)
        verdict = grade(text, answer)
        assert set(verdict) <= {0.0, 1.0} and verdict == _by_the_rules(answer, text), (answer, text)
        verdicts[verdict] += 1
    assert min(verdicts[0.0, 0.0], verdicts[0.0, 1.0], verdicts[1.0, 1.0]) > 5  # (1, 0) fails above


def _reachable(numbers: tuple[int, ...]) -> set[str]:
    """Returns every well-formed answer by enumeration."""
    if len(numbers) == 1:
        return {""}
    found = set()
    for i, j in permutations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for sign in OPERATIONS:
            for result in range(numbers[i] * numbers[j] + numbers[i] + numbers[j] + 1):
                if _true(numbers[i], sign, numbers[j], result):
                    step = f"{numbers[i]}{sign}{numbers[j]}={result}"
                    found |= {f"{step};{more}".rstrip(";") for more in _reachable((*rest, result))}
    return found


def _mirrored(text: str) -> str:
    """Puts the larger number first in sums and products."""
    steps = []
    for step in text.split(";"):
        sign = next(c for c in step if c in OPERATIONS)
        (left, right), result = step.split("=")[0].split(sign), step.split("=")[1]
        if sign in "+*" and int(left) < int(right):
            left, right = right, left
        steps.append(f"{left}{sign}{right}={result}")
    return ";".join(steps)


def test_solver_finds_every_answer_and_no_other() -> None:
    checked = [(a, b) for a, b in product(range(8), repeat=2) if a <= b] + [(0, 3, 3), (1, 2, 4), (2, 2, 6), (3, 4, 5)]
    for numbers in checked:
        solved = [write_steps(steps) for steps in solutions(numbers, OPERATIONS)]
        brute = _reachable(numbers)
        assert sorted(solved) == sorted({_mirrored(text) for text in brute}), numbers  # each once
        for text in brute:
            last = int(text.rsplit("=", 1)[1])
            assert grade(text, {"numbers": list(numbers), "target": last}) == (1, 1), text


def test_solver_uses_only_the_operations_allowed() -> None:
    assert {write_steps(s) for s in solutions((2, 6), "-")} == {"6-2=4"}
    assert {write_steps(s) for s in solutions((2, 6), "+/")} == {"6+2=8", "6/2=3"}


@pytest.mark.parametrize("min_ways", [1, 2, 3])
@pytest.mark.parametrize("operations", ["+-*", OPERATIONS])
def test_every_problem_is_solvable_and_none_is_missing(operations: str, min_ways: int) -> None:
    expected = set()
    for numbers in combinations_with_replacement(range(1, 6), 3):
        ways: dict[int, set[str]] = {}
        for text in map(_mirrored, _reachable(numbers)):
            if set(text) & set(OPERATIONS) <= set(operations):
                ways.setdefault(int(text.rsplit("=", 1)[1]), set()).add(text)
        expected |= {(numbers, end) for end, texts in ways.items() if 1 <= end <= 50 and len(texts) >= min_ways}
    settings = {"operations": operations, "largest_number": 5, "largest_target": 50, "min_ways": min_ways}
    train = {_asked(p.prompt) for p in CountdownSteps(**settings, held_out_problems=1).train_problems()}
    held_out = CountdownSteps(**settings, held_out_problems=len(expected) - len(train)).benchmarks()["countdown"]
    assert train | {_asked(p.prompt) for p in held_out} == expected
    with pytest.raises(SettingError):  # there is no further problem
        CountdownSteps(**settings, held_out_problems=len(expected) - len(train) + 1).benchmarks()


def _asked(prompt: str) -> tuple[tuple[int, ...], int]:
    numbers, target = prompt.rstrip(":").split(">")
    return tuple(sorted(map(int, numbers.split(",")))), int(target)


def test_train_and_held_out_share_no_problem() -> None:
    task = CountdownSteps()
    train, held_out = task.train_problems(), task.benchmarks()["countdown"]
    assert len(held_out) == 500
    for problem in [*train, *held_out]:  # prompt and answer have the same numbers and target
        assert _asked(problem.prompt) == (tuple(problem.answer["numbers"]), problem.answer["target"])
        assert problem.prompt.endswith(":") and problem.info == {"level": 3}
    assert not {_asked(p.prompt) for p in train} & {_asked(p.prompt) for p in held_out}
    assert len({_asked(p.prompt) for p in held_out}) == 500  # each in one order only
    for asked, times in Counter(_asked(p.prompt) for p in train).items():
        assert times == len(set(permutations(asked[0])))  # train problems in every order
    for problems in (train, held_out):
        assert len({p.id for p in problems}) == len({p.prompt for p in problems}) == len(problems)


def test_fewer_orders_ask_the_same_problems() -> None:
    every, two, one = (CountdownSteps(orders=n).train_problems() for n in (6, 2, 1))
    assert {_asked(p.prompt) for p in every} == {_asked(p.prompt) for p in two}
    assert {p.id for p in one} < {p.id for p in two} < {p.id for p in every}
    assert len(one) == len({_asked(p.prompt) for p in every})
    for asked, times in Counter(_asked(p.prompt) for p in two).items():
        assert times == min(2, len(set(permutations(asked[0]))))


def test_held_out_share_and_seed() -> None:
    none, few, many = (
        {_asked(p.prompt) for p in CountdownSteps(held_out_share=share, held_out_problems=1).train_problems()}
        for share in (0.01, 0.27, 0.5)
    )
    assert many < few < none  # a larger share holds out more problems of the same set
    assert abs(len(few) / len(none) - 0.73) < 0.04
    plain, other = (CountdownSteps(seed=seed, orders=1) for seed in (0, 1))
    assert [_asked(p.prompt) for p in plain.train_problems()] == [_asked(p.prompt) for p in other.train_problems()]
    assert [p.prompt for p in plain.train_problems()] != [p.prompt for p in other.train_problems()]


def test_several_counts_give_equally_many_problems() -> None:
    """The first problems of each count by hash are used, so a problem is held out in every mixture."""
    settings = {"largest_number": 7, "held_out_problems": 1, "orders": 2}
    mixed = CountdownSteps([3, 4], **settings)
    apart = {count: {p.id for p in CountdownSteps(count, **settings).train_problems()} for count in (3, 4)}
    levels = Counter(p.info["level"] for p in mixed.train_problems())
    assert levels == {3: len(apart[3]), 4: len(apart[3])}
    ids = [p.id for p in mixed.train_problems()]
    assert apart[3] < set(ids) and set(ids) - apart[3] < apart[4]
    assert Counter(p.info["level"] for p in mixed.train_problems()[:200]) == {3: 100, 4: 100}
    held_out = CountdownSteps([3, 4], **settings | {"held_out_problems": 100}).benchmarks()["countdown"]
    assert Counter(len(p.answer["numbers"]) for p in held_out) == {3: 50, 4: 50}
    assert not {_asked(p.prompt) for p in held_out} & {_asked(prompt + ":") for prompt in apart[3] | apart[4]}


SHOW = """
from popo_lightning.toys.countdown import CountdownSteps, solutions
import hashlib, sys
task = CountdownSteps(operations="+-*/", largest_number=7, held_out_problems=50)
shown = [task.train_problems(), task.benchmarks(), list(solutions((2, 3, 6, 6), "+-*/"))]
print(hashlib.sha256(repr(shown).encode()).hexdigest(), "torch" in sys.modules)
"""


def test_same_problems_in_every_process_without_torch() -> None:
    shown = {
        subprocess.run(
            [sys.executable, "-c", SHOW], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout.decode()
        for seed in ("1", "2")
    }
    assert len(shown) == 1 and shown.pop().split()[1] == "False"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"numbers": 1}, "data.task.numbers is 1"),
        ({"numbers": 6}, "data.task.numbers is 6"),
        ({"numbers": []}, "data.task.numbers is []"),
        ({"numbers": [3, 3]}, "data.task.numbers is [3, 3]"),
        ({"numbers": [3, 6]}, "data.task.numbers is [3, 6]"),
        ({"operations": ""}, "data.task.operations is ''"),
        ({"operations": "+x"}, "data.task.operations is '+x'"),
        ({"orders": 0}, "data.task.orders is 0"),
        ({"min_ways": 0}, "data.task.min_ways is 0"),
        ({"held_out_problems": -1}, "data.task.held_out_problems is -1"),
        ({"held_out_share": 0.0}, "data.task.held_out_share is 0"),
        ({"held_out_share": 1.0}, "data.task.held_out_share is 1"),
        ({"held_out_problems": 10_000}, "data.task.held_out_problems is 10000"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(SettingError) as refused:
        CountdownSteps(**settings).train_problems()
    assert named in str(refused.value)
