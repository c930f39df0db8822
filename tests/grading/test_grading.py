"""The grading pool against hostile verifiers, with real processes."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import graders
from helpers.places import REPOSITORY, TESTS

from popo_lightning.core.errors import SettingError
from popo_lightning.grading.pool import MAX_RESPONSE_CHARS, Grade, GradingPool, check_grades
from popo_lightning.grading.process import GradingProcess

LIMIT = 0.5
PATIENCE = 20.0  # seconds that a busy machine may take for a step that takes none; the deeds without a limit take 1000
ZEROS = {"score": 0.0, "acc": 0.0}


@pytest.fixture
def pool() -> Iterator[GradingPool]:
    with GradingPool(graders.misbehave, grading_timeout=LIMIT) as pool:
        yield pool


def around(pool: GradingPool, *deeds: tuple[Any, str]) -> list[Grade]:
    """Grades the deeds between two good responses, which must keep their grades, and returns the deeds' grades."""
    first, *middle, last = pool.grade([("ab", "ab"), *deeds, ("ab", "abc")])
    assert (first.parts["score"], first.parts["acc"], first.failure) == (2.0, 1.0, None)
    assert (last.parts["score"], last.parts["acc"], last.failure) == (3.0, 0.0, None)
    return middle


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_two_workers_keep_the_order_of_the_items_and_end_with_the_pool() -> None:
    items: list[tuple[Any, str]] = [("x", "x" * (1 + (7 * i) % 13)) for i in range(60)]
    items[3] = (0.3, "nap")
    with GradingPool(graders.misbehave, workers=2) as pool:
        grades = pool.grade(items)
    expected = [1.0 if text == "nap" else float(len(text)) for _, text in items]
    assert [grade.parts["score"] for grade in grades] == expected
    pids = {int(grade.parts["pid"]) for grade in grades if "pid" in grade.parts}
    assert [alive(pid) for pid in pids] == [False, False]


def test_acc_defaults_to_score_and_parts_are_floats(pool: GradingPool) -> None:
    (grade,) = around(pool, ({"score": True, "format": 2}, "return"))
    assert grade == Grade({"score": 1.0, "acc": 1.0, "format": 2.0})
    assert all(type(value) is float for value in grade.parts.values())


@pytest.mark.parametrize("deed", ["loop", "loop in c", "ignore signals"])
def test_a_hang_is_a_timeout_and_the_others_are_graded(pool: GradingPool, deed: str) -> None:
    around(pool)  # start a worker first, so that its start is not measured
    begin = time.monotonic()
    assert around(pool, ("", deed)) == [Grade(ZEROS, "timeout")]
    assert LIMIT <= time.monotonic() - begin < LIMIT + PATIENCE


def test_each_response_has_its_own_limit(pool: GradingPool) -> None:
    assert [grade.failure for grade in around(pool, *[(0.3, "nap")] * 4)] == [None] * 4


def test_a_hang_does_not_hold_up_the_other_worker() -> None:
    with GradingPool(graders.misbehave, workers=2, grading_timeout=1.0) as pool:
        pool.grade([("", "a")] * 50)
        grades = pool.grade([("", "loop"), *[("", "a")] * 20, ("", "loop")])
    assert [grade.failure for grade in grades] == ["timeout", *[None] * 20, "timeout"]


@pytest.mark.parametrize("deed", ["os._exit", "segfault", "close everything", "run a program and die"])
def test_a_death_is_a_crash_noticed_at_once(deed: str) -> None:
    with GradingPool(graders.misbehave, grading_timeout=100.0) as pool:
        begin = time.monotonic()
        assert around(pool, ("", deed)) == [Grade(ZEROS, "crash")]
        assert time.monotonic() - begin < 50


@pytest.mark.parametrize("deed", ["raise", "raise unprintable", "sys.exit", "recurse"])
def test_an_exception_is_an_error_and_the_worker_stays(pool: GradingPool, deed: str) -> None:
    (before,) = pool.grade([("", "a")])
    assert around(pool, ("", deed), (graders.BreaksOnArrival(), "return")) == [Grade(ZEROS, "error")] * 2
    assert pool.grade([("", "a")]) == [before]  # the parts contain the worker's pid


def test_the_first_error_is_logged_once(pool: GradingPool, caplog: pytest.LogCaptureFixture) -> None:
    around(pool, ("", "raise"), ("", "raise"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ZeroDivisionError" in caplog.text


NONSENSE = [
    {"score": math.nan},
    {"score": math.inf},
    {"score": 1.0, "acc": -math.inf},
    {"acc": 1.0},
    {},
    None,
    math.nan,
    [("score", 1.0)],
    {"score": "1.0"},
    {"score": None},
    {"score": 1j},
    {"score": 10**400},
    {"score": 1.0, 2: 1.0},
    {"score": 1.0, **{f"part {i}": 1.0 for i in range(10_000)}},
]


@pytest.mark.parametrize("number", [0.5, 1, True, Fraction(1, 2)])
def test_a_bare_number_is_the_score(pool: GradingPool, number: Any) -> None:
    assert around(pool, (number, "return")) == [Grade({"score": float(number), "acc": float(number)})]


def test_a_scalar_of_numpy_or_torch_is_a_number() -> None:
    numbers = [np.float32(0.5), np.int64(1), np.bool_(True), np.array(0.5), torch.tensor(0.5)]
    with GradingPool(graders.misbehave, grading_timeout=60.0) as patient:  # the worker has to import torch
        bare = patient.grade([(number, "return") for number in numbers])
        parts = patient.grade([({"score": number}, "return") for number in numbers])
        (vector,) = patient.grade([(np.array([1.0, 2.0]), "return")])
    assert bare == parts == [Grade({"score": float(number), "acc": float(number)}) for number in numbers]
    assert vector.failure == "invalid"
    assert patient.first_failure == "the verifier returned array([1., 2.]) for the response 'return'"


@pytest.mark.parametrize("name", ["a/b", "", "x,y\n", "a b", "ok\n", '"', "step,1"])
def test_a_component_that_no_metric_can_be_named_after(pool: GradingPool, name: str) -> None:
    """Its column would damage metrics.csv, also if it first comes up late in a run."""
    assert around(pool, ({"score": 1.0, name: 2.0}, "return")) == [Grade(ZEROS, "invalid")]
    said = f"named a component {name!r}, where a name has letters, digits, - and _ alone, for the response 'return'"
    assert pool.first_failure == f"the verifier {said}"
    assert pool.grade([({"score": 1.0, "süß_2-x": 2.0}, "return")])[0].parts["süß_2-x"] == 2.0


def test_a_score_that_no_tensor_can_hold(pool: GradingPool) -> None:
    assert around(pool, (1e39, "return"), ({"score": 0.0, "cost": -1e300}, "return")) == [Grade(ZEROS, "invalid")] * 2


FAILURES = [
    ("", "loop", "took over 0.5 s (data.grading_timeout) for the response 'loop'"),
    ("", "os._exit", "ended its process (status 0) over the response 'os._exit'"),
    ("", "segfault", "ended its process (status -11) over the response 'segfault'"),
    (b"\xff\xff\xff\xff", "forge", "sent a reply that is no grade for the response 'forge'"),
    (
        "",
        "x" * (MAX_RESPONSE_CHARS + 1),
        "reads at most 1,000,000 characters, fewer than has the response that ends",
    ),
    (math.nan, "return", "returned nan for the response 'return'"),
    ({"acc": 1.0}, "return", "returned {'acc': 1.0} for the response 'return'"),
    ({"score": "1.0"}, "return", "returned {'score': '1.0'} for the response 'return'"),
    ([1.0], "return", "returned [1.0] for the response 'return'"),
    (None, "return", "returned None for the response 'return'"),
    ("", "raise", "raised ZeroDivisionError: division by zero at graders.py:"),
]


@pytest.mark.parametrize(("gold", "deed", "reason"), FAILURES)
def test_the_first_failure_of_any_kind_is_named_once(
    pool: GradingPool, caplog: pytest.LogCaptureFixture, gold: Any, deed: str, reason: str
) -> None:
    around(pool)
    assert pool.first_failure is None
    around(pool, (gold, deed), (gold, deed), ("", "sys.exit"))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"the verifier {reason}" in record.getMessage() and "that response gets 0" in record.getMessage()
    assert pool.first_failure is not None and record.getMessage().startswith(pool.first_failure)
    assert len(record.getMessage()) < 1200


def test_a_reason_keeps_its_quotes_and_backslashes(pool: GradingPool) -> None:
    around(pool, ("'\\ \"\n\x1b é", "return"))
    assert pool.first_failure == """the verifier returned '\\'\\\\ "\\n\\x1b \\xe9' for the response 'return'"""


def test_nothing_graded_is_refused_and_something_is_not() -> None:
    none = {"responses": 8.0, "failures": 8.0}
    with pytest.raises(SettingError, match=r"none of the 8 responses .* be graded: the verifier broke; .*data\.task"):
        check_grades(none, [None, "the verifier broke"])
    check_grades(none | {"failures": 7.0}, ["the verifier broke"])
    check_grades({"responses": 0.0, "failures": 0.0}, [None])  # a rule that samples nothing at first


def test_nonsense_is_named_with_the_text_that_caused_it(pool: GradingPool, caplog: pytest.LogCaptureFixture) -> None:
    around(pool, ("none of it", "return"), ([], "return"))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == "the verifier returned 'none of it' for the response 'return'; that response gets 0"


def test_an_error_is_named_with_the_text_that_caused_it(pool: GradingPool, caplog: pytest.LogCaptureFixture) -> None:
    around(pool, ("", "raise"))
    assert re.search(
        r"raised ZeroDivisionError: division by zero at graders\.py:\d+ for the response 'raise'", caplog.text
    )


def test_nonsense_is_invalid_and_the_worker_stays(pool: GradingPool) -> None:
    (before,) = pool.grade([("", "a")])
    grades = around(pool, *[(value, "return") for value in NONSENSE])
    assert grades == [Grade(ZEROS, "invalid")] * len(NONSENSE)
    assert pool.grade([("", "a")]) == [before]


@pytest.mark.parametrize(
    "message",
    [
        graders.forged({"item": 1, "parts": {"score": math.nan}}),
        graders.forged({"item": 1, "parts": {"acc": 1.0}}),
        graders.forged({"item": 1}),
        graders.forged({"item": 2, "parts": {"score": 1.0}}),
        graders.forged({"item": 1, "parts": {"score": 1.0}}) * 2,
        graders.forged({"item": 1, "parts": {"score": 1.0}}) + b" ",
        graders.framed(b"[1]"),
        graders.framed(b"\x80\x04."),
        graders.framed(b"[" * 60_000),
        graders.framed(b'{"item": 1, "parts": {"score": ' + b"9" * 5000 + b"}}"),
        b"\xff\xff\xff\xff",
    ],
)
def test_a_subverted_grader_cannot_send_what_a_sound_one_would_not(pool: GradingPool, message: bytes) -> None:
    assert around(pool, (message, "forge")) == [Grade(ZEROS, "invalid")]


def test_half_a_reply_is_a_timeout(pool: GradingPool) -> None:
    assert around(pool, (b"\x00\x00\x00\x50{", "forge"), (b"\x00", "forge")) == [Grade(ZEROS, "timeout")] * 2


def test_a_response_over_the_cap_is_invalid_and_one_at_the_cap_is_graded(pool: GradingPool) -> None:
    longest = "x" * MAX_RESPONSE_CHARS
    assert around(pool, ("", longest + "x")) == [Grade(ZEROS, "invalid")]
    (grade,) = around(pool, (longest, longest))
    assert grade.parts["score"] == MAX_RESPONSE_CHARS
    assert around(pool, ("\ud800", "\ud800"))[0].parts["acc"] == 1.0  # an unpaired surrogate


def test_printing_does_not_disturb_the_replies(pool: GradingPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert around(pool, ("", "print")) == [Grade({"score": 1.0, "acc": 1.0})]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("deed", "failure"), [("fork and loop", "timeout"), ("fork and die", "crash")])
def test_a_child_that_holds_the_socket_is_killed_too(
    pool: GradingPool, tmp_path: Path, deed: str, failure: str
) -> None:
    note = tmp_path / "pid"
    begin = time.monotonic()
    assert around(pool, (str(note), deed)) == [Grade(ZEROS, failure)]
    assert time.monotonic() - begin < LIMIT + PATIENCE
    assert within(PATIENCE, lambda: not alive(int(note.read_text())))


def test_a_verifier_that_forks_and_returns_twice_replies_once(pool: GradingPool) -> None:
    grades = around(pool, *[("", "fork and return twice")] * 3)
    assert grades == [Grade({"score": 1.0, "acc": 1.0})] * 3


def test_an_alarm_left_behind_strikes_no_later_response() -> None:
    with GradingPool(graders.misbehave) as pool:
        assert [grade.failure for grade in around(pool, ("", "leave alarm"), (1.3, "nap"))] == [None, None]


def test_a_killed_worker_is_replaced_before_the_next_call(pool: GradingPool) -> None:
    (before,) = pool.grade([("", "a")])
    assert pool.grade([("", "loop")]) == [Grade(ZEROS, "timeout")]
    assert not alive(int(before.parts["pid"]))
    (after,) = pool.grade([("", "a")])
    assert after.failure is None
    os.kill(int(after.parts["pid"]), signal.SIGKILL)  # idle, as when memory runs out: no response gets 0 for it
    assert within(PATIENCE, lambda: not alive(int(after.parts["pid"])))
    assert [grade.failure for grade in pool.grade([("", "a")] * 2)] == [None, None]


def test_an_interrupted_call_leaves_a_usable_pool() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with GradingPool(graders.misbehave, grading_timeout=30.0) as pool:
            pool.grade([("", "a")])
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                pool.grade([("", "loop"), ("", "a")])
            around(pool)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_loading_the_verifier_does_not_count_against_a_response() -> None:
    with GradingPool(graders.LoadsSlowly(), grading_timeout=0.3) as pool:
        assert pool.grade([("", "a")])[0].failure is None


def test_a_verifier_that_stalls_while_it_loads_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradingProcess, "start_seconds", 0.3)
    with GradingPool(graders.LoadsSlowly()) as pool, pytest.raises(RuntimeError, match=r"took over 0\.3 s"):
        pool.grade([("", "a")])


@pytest.mark.parametrize(("how", "message"), [("raise", "no such library"), ("exit", "status 4")])
def test_a_verifier_that_cannot_be_loaded_raises(how: str, message: str) -> None:
    with GradingPool(graders.RefusesToLoad(how), workers=2) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                pool.grade([("", "a")])


def test_items_are_graded_while_others_are_still_to_come(pool: GradingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are graded before a call waits for them, in the order in which they were submitted."""
    pool.grade([("", "a")])
    pool.submit([("a", "a"), ("a", "b" * (MAX_RESPONSE_CHARS + 1))])
    pool.submit([("b", "a"), (0.0, "nap")])

    def nothing_left_to_do() -> bool:
        pool.poll()
        return len(pool._grades) == 4

    assert within(PATIENCE, nothing_left_to_do)
    monkeypatch.setattr(pool, "_advance", lambda seconds: pytest.fail("waited for a grade that was there"))
    grades = pool.collect()
    monkeypatch.undo()
    assert [grade.failure for grade in grades[:3]] == [None, "invalid", None]
    assert pool.collect() == []


def test_what_was_offered_can_be_dropped(pool: GradingPool) -> None:
    pool.grade([("", "a")])
    pool.submit([(1000.0, "nap"), ("a", "a")])
    pool.discard()
    assert len(pool.grade([("", "a")])) == 1


def test_an_empty_list_starts_nothing_and_close_can_be_repeated() -> None:
    pool = GradingPool(graders.RefusesToLoad("raise"))
    assert pool.grade([]) == []
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade([("", "a")])


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"grading_timeout": 0}, {"grading_timeout": math.inf}])
def test_settings_that_cannot_work_raise(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        GradingPool(graders.exact, **arguments)


PARENT = """
import sys
sys.path[:0] = [{here!r}, {root!r}]
from helpers import graders
from popo_lightning.grading.pool import GradingPool
print("loaded once", flush=True)
pool = GradingPool(graders.misbehave, grading_timeout=100)
print(int(pool.grade([("", "a")])[0].parts["pid"]), flush=True)
{last}
"""


@pytest.mark.parametrize("busy", [True, False])
def test_no_worker_outlives_its_parent(tmp_path: Path, busy: bool) -> None:
    """The worker also does not import the parent's script again, which may import torch."""
    note, script = tmp_path / "note", tmp_path / "parent.py"
    last = f"pool.grade([({str(note)!r}, 'note and loop')])" if busy else "import time; time.sleep(1000)"
    script.write_text(PARENT.format(here=str(TESTS), root=str(REPOSITORY), last=last))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "loaded once\n"
            pid = int(parent.stdout.readline())
            assert not busy or within(PATIENCE, note.exists)
            assert alive(pid)
        finally:
            parent.kill()
        assert parent.stdout.read() == ""
    assert within(PATIENCE, lambda: not alive(pid))


def test_a_warm_worker_grades_a_batch_in_milliseconds() -> None:
    with GradingPool(graders.exact) as pool:
        pool.grade([("a", "a")])
        seconds = []
        for _ in range(10):  # the quickest of several, since the machine may be busy
            begin = time.monotonic()
            grades = pool.grade([("a", "ab"[i % 2]) for i in range(128)])
            seconds.append(time.monotonic() - begin)
            assert [grade.parts["score"] for grade in grades] == [1.0, 0.0] * 64
    assert min(seconds) < 0.5  # 0.02 on a slow virtual machine; polling every 5 ms would exceed 0.5
