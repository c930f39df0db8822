"""The instrument against a simulation, closed forms and data without confounding; its expressions and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.exports import refused, said_by

from popo_lightning.cli.estimate import instrument
from popo_lightning.cli.estimate.action import parsed
from popo_lightning.cli.estimate.instrument import Effect, effect, instrument_weights
from popo_lightning.core.errors import SettingError


def simulated(n: int = 400_000, u: float = 1.0, z: float = 0.5, seed: int = 0) -> Effect:
    """U is uniform, P(A) = 0.2 + 0.5 Z - 0.3 (U - 0.5), P(R) = 0.7 - 0.6 U + 0.15 A.

    ``u`` and ``z`` scale their effects.
    """
    random = np.random.default_rng(seed)
    hidden, hinted = random.random(n), random.random(n) < 0.5
    acts = random.random(n) < 0.2 + z * hinted - 0.3 * u * (hidden - 0.5)
    rewards = (random.random(n) < 0.7 - 0.6 * u * hidden + 0.15 * acts).astype(float)
    return effect(hinted, acts, rewards, np.arange(n))  # type: ignore[arg-type]


def test_confounded_behavior() -> None:
    """The truth is 0.150. The policy acts more on easy problems, which misleads all but the instrument."""
    found = simulated()
    # E[U | A] differs by cov(U, A) / var(A): the closed form of the naive difference is 0.15 + 0.6 * 0.3 / 12 / var(A)
    acting = 0.45
    assert found.naive.value == pytest.approx(0.15 + 0.6 * 0.3 / 12 / (acting * (1 - acting)), abs=0.005)
    assert found.naive.value == pytest.approx(0.209, abs=0.005)
    assert found.wald.value == pytest.approx(0.150, abs=0.008)
    assert found.wald.low < 0.15 < found.wald.high < found.naive.low
    assert found.p11 == pytest.approx(0.7, abs=0.005) and found.p10 == pytest.approx(0.2, abs=0.005)
    assert found.always.value == pytest.approx(0.55, abs=0.008) and found.never.value == pytest.approx(0.4, abs=0.008)
    assert found.always.value - found.never.value == pytest.approx(found.wald.value)


def test_without_confounding_both_agree() -> None:
    found = simulated(u=0.0)
    assert found.naive.low < 0.15 < found.naive.high
    assert found.wald.low < found.naive.value < found.wald.high
    assert found.wald.high - found.wald.low > found.naive.high - found.naive.low, "the instrument costs certainty"


def test_intervals_cover() -> None:
    covered = np.array(
        [
            [each.low <= truth <= each.high for each, truth in ((f.wald, 0.15), (f.always, 0.55), (f.never, 0.4))]
            for f in (simulated(3000, seed=seed) for seed in range(200))
        ]
    )
    assert ((covered.mean(0) > 0.91) & (covered.mean(0) < 0.99)).all(), covered.mean(0)


def test_responses_to_one_problem_count_as_dependent() -> None:
    random = np.random.default_rng(1)
    hinted = random.random(500) < 0.5
    acts = random.random(500) < 0.2 + 0.6 * hinted
    rewards = (random.random(500) < 0.5).astype(float)
    once = effect(hinted, acts, rewards, range(500))
    copied = effect(np.tile(hinted, 4), np.tile(acts, 4), np.tile(rewards, 4), list(range(500)) * 4)
    for name in ("value", "low", "high"):
        assert getattr(copied.wald, name) == pytest.approx(getattr(once.wald, name))
    apart = effect(np.tile(hinted, 4), np.tile(acts, 4), np.tile(rewards, 4), range(2000))
    assert apart.wald.high - apart.wald.low == pytest.approx((once.wald.high - once.wald.low) / 2)


@pytest.mark.parametrize("z", [0.0, 0.04])
def test_weak_instruments_are_refused(z: float) -> None:
    with pytest.raises(SettingError, match=r"instrument is weak: .* by less than 0.05"):
        simulated(z=z)
    with pytest.raises(SettingError, match="F is below 10"):
        simulated(40, z=0.3)
    with pytest.raises(SettingError, match="the same in all rows"):
        effect(np.ones(9, bool), np.ones(9, bool), np.ones(9), range(9))


@pytest.mark.parametrize(("p11", "p10"), [(0.7, 0.2), (0.2, 0.9), (0.55, 0.5), (1.0, 0.0)])
def test_weights_of_the_arms_give_the_policy(p11: float, p10: float) -> None:
    """2212.14468: sum over z of c(z) P(a | z) = pi(a), for both a."""
    for acts in (0.0, 0.3, 0.5, 1.0):
        c0, c1 = instrument_weights(acts, p11, p10)
        assert abs(c0 * p10 + c1 * p11 - acts) < 1e-12
        assert abs(c0 * (1 - p10) + c1 * (1 - p11) - (1 - acts)) < 1e-12


def test_mutations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: dict[str, Any] = {
        "arms exchanged": lambda acts, p11, p10: instrument_weights(acts, p11, p10)[::-1],
        "not divided": lambda acts, p11, p10: (1 - (acts - p10), acts - p10),
    }
    for name, mutant in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(instrument, "instrument_weights", mutant)
            with pytest.raises(AssertionError):
                test_confounded_behavior()
                pytest.fail(name)
    with monkeypatch.context() as patch:
        patch.setattr(instrument, "NORMAL", 1.0)
        with pytest.raises(AssertionError):
            test_intervals_cover()
            pytest.fail("short intervals")


# -- what a response does --------------------------------------------------------------------------------------

ROW = {"tokens": 513, "response": 'it is "so", step by step', "parts": {"format": 1.0, "acc": 0.0}, "level": "hard"}


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("len>512", True),
        ("len > 513", False),
        (" tokens>=513 ", True),
        ("length<513", False),
        ("len<=513.0", True),
        ("format==1", True),
        ("acc!=0", False),
        ("acc>-1", True),
        ('response contains "step"', True),
        ('text contains "Step"', False),
        ('text contains "\\"so\\""', True),
        ('level contains "hard"', True),
    ],
)
def test_expressions(expression: str, holds: bool) -> None:
    assert parsed(expression)(ROW) is holds


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "len",
        "len>",
        "512<len",
        "len>512 or 1",
        "len>5e3",
        "len>__import__('os').system('true')",
        "__import__('os')",
        "len>512; 1",
        "len=512",
        "parts.format>1",
        "text contains step",
        'text contains ""',
        'text contains "\\x"',
        "len>" + "9" * 5000,
        'text contains "' + "a" * 5000 + '"',
        "len>\u0661",
    ],
)
def test_what_is_no_expression_is_refused(expression: str) -> None:
    with pytest.raises(SettingError, match="write one comparison"):
        parsed(expression)


def test_fields_that_are_not_there_or_of_another_kind() -> None:
    for expression, words in {
        "size>1": "names 'size', which a row does not have; it has level, parts, response, tokens",
        "level>1": "compares 'level' with a number",
        'len contains "5"': "looks for text in 'len'",
    }.items():
        with pytest.raises(SettingError, match=words):
            parsed(expression)(ROW)


def test_a_response_whose_grading_failed_has_no_part() -> None:
    assert parsed("format>=1")({"parts": {"score": 0.0, "acc": 0.0}, "failure": "too slow"}) is False


# -- the command -----------------------------------------------------------------------------------------------


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of_a_simulation(n: int = 4000) -> list[dict[str, Any]]:
    random = np.random.default_rng(7)
    hidden, hinted = random.random(n), random.random(n) < 0.5
    acts = random.random(n) < 0.2 + 0.5 * hinted - 0.3 * (hidden - 0.5)
    right = random.random(n) < 0.7 - 0.6 * hidden + 0.15 * acts
    return [
        {"problem": str(i // 2), "hint": int(hinted[i]), "tokens": 600 if acts[i] else 100, "acc": float(right[i])}
        for i in range(n)
    ]


def test_the_command_says_what_the_behavior_does(tmp_path: Path) -> None:
    rows = rows_of_a_simulation()
    greedy = [{"problem": "g", "greedy": True, "acc": 1.0}]
    files = [written(tmp_path / "a.jsonl", rows[:1000] + greedy), written(tmp_path / "b.jsonl", rows[1000:])]
    code, out, err = said_by("estimate", *files, "--instrument", "hint", "--action", "len>512")
    assert code == 0, err
    heading, _, always, never, wald, naive = out.splitlines()
    assert heading.startswith("4000 responses to 2000 problems; len>512 holds for 0.7")
    lines = {line.split("  ")[0].strip(): line for line in (always, never, wald, naive)}
    assert list(lines) == ["mean acc if always", "mean acc if never", "effect (Wald ratio)", "naive difference"]
    found = effect(
        np.array([row["hint"] for row in rows], bool),
        np.array([row["tokens"] > 512 for row in rows]),
        np.array([row["acc"] for row in rows]),
        [row["problem"] for row in rows],
    )
    assert f"{found.wald.value:.3f}  [{found.wald.low:.3f}, {found.wald.high:.3f}]" in wald


def test_a_failed_grade_is_0_in_every_part(tmp_path: Path) -> None:
    rows = [row | {"parts": {"format": row["acc"]}} for row in rows_of_a_simulation()]
    wrong = next(i for i, row in enumerate(rows) if not row["acc"])
    failed = [row | ({"parts": {}, "failure": "too slow"} if i == wrong else {}) for i, row in enumerate(rows)]
    asked = ("--instrument", "hint", "--action", "len>512", "--reward", "format")
    found = [said_by("estimate", written(tmp_path / "a.jsonl", each), *asked) for each in (rows, failed)]
    assert found[0] == found[1] and found[0][0] == 0


def test_the_command_refuses(tmp_path: Path) -> None:
    rows = rows_of_a_simulation(400)
    file = written(tmp_path / "a.jsonl", rows)
    weak = written(tmp_path / "weak.jsonl", [row | {"hint": i % 2} for i, row in enumerate(rows)])
    none = written(tmp_path / "none.jsonl", [{k: v for k, v in row.items() if k != "hint"} for row in rows])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"hint": 1}\n[1]\n')
    hint = ("--instrument", "hint", "--action", "len>512")
    for args, words in {
        (file, "--instrument", "hint"): "--action is missing",
        (file, "--action", "len>512"): "--instrument is missing",
        (file, "--instrument", "hint", "--action", "len"): "write one comparison",
        (weak, *hint): "the instrument is weak",
        (none, *hint): "line 1 of",
        (broken, *hint): "names 'len', which a row does not have",
        (tmp_path / "x", *hint): "is no file",
        (file, *hint, "--reward", "score"): "has no number 'score'",
        (file, file): "is one RUN_OR_CHECKPOINT too many",
    }.items():
        assert words in refused("estimate", *args), args
