"""Runs as processes: made once, skipped, refused, failed, stopped and continued. Most tests need no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.comparisons import method_files, write_comparison
from helpers.places import REPOSITORY, TESTS
from helpers.scripted_runs import FINISH, STOPPED, scripted_run
from helpers.tiny_models import metrics

from popo_lightning.cli.compare.command import main
from popo_lightning.cli.compare.plan import PlannedRun, is_finished, read_record, write_record
from popo_lightning.cli.compare.runs import TAIL_LINES, locked, run_all
from popo_lightning.core.errors import SettingError


def wait_for(what: Callable[[], bool], seconds: float = 50.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def state_of(run: PlannedRun) -> str:
    """Makes one run, and returns how it ended."""
    (outcome,) = run_all([run], print, lambda run: "")
    return outcome.state


def is_held(folder: Path) -> bool:
    with locked(folder) as lock:
        return lock is None


def compare_process(folder: Path, script: str, *more: str) -> subprocess.Popen[bytes]:
    """Starts a process that makes two runs. `more` is how many at once, and the second run's script."""
    program = TESTS / "helpers" / "scripted_runs.py"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, str(program), str(folder), script, *more], env=environment)


def test_made_once_then_skipped(tmp_path: Path) -> None:
    lines: list[str] = []
    runs = [scripted_run(tmp_path, seed=seed) for seed in (1, 2)]
    outcomes = run_all(runs, lines.append, lambda run: "0.5")
    assert [outcome.state for outcome in outcomes] == ["finished", "finished"]
    assert "made" in (runs[0].folder / "log.txt").read_text()
    assert [line.split(":")[0] for line in lines[1:]] == [f"[{n} of 2] popo, seed {n}" for n in (1, 1, 2, 2)]
    assert "min left" in lines[2]
    assert "left" not in lines[4]
    written = (runs[0].folder / "log.txt").stat().st_mtime_ns
    assert run_all(runs, lines.append, lambda run: "0.5") == []
    assert lines[-1].startswith("2 runs: 2 finished before, 0 to do")
    assert (runs[0].folder / "log.txt").stat().st_mtime_ns == written


def test_failures_do_not_stop_the_others(tmp_path: Path) -> None:
    """A run fails by its exit code, or by an end without a summary. The reason is the end of its log."""
    noisy = "import sys; print('x' * 9000); [print('line', i) for i in range(99)]; print('\\x1b[31mlast'); sys.exit(3)"
    runs = [
        scripted_run(tmp_path, noisy, 1),
        scripted_run(tmp_path, "print('no summary')", 2),
        scripted_run(tmp_path, seed=3),
    ]
    lines: list[str] = []
    outcomes = run_all(runs, lines.append, lambda run: "0.5")
    assert [outcome.state for outcome in outcomes] == ["failed", "failed", "finished"]
    reason = outcomes[0].reason.splitlines()
    assert "exit code 3" in reason[0]
    assert len(reason) == 1 + TAIL_LINES
    assert reason[-1].strip() == "[31mlast"
    assert "line 98" in reason[-2]
    assert "without a summary.json" in outcomes[1].reason
    assert any("line 98" in line for line in lines)


def test_an_unfinished_run_is_made_again(tmp_path: Path) -> None:
    run = scripted_run(tmp_path)
    run.folder.mkdir()
    write_record(run)
    assert not is_finished(run)
    assert state_of(run) == "finished"
    assert is_finished(run)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    """Another argument, other file content or a foreign run is refused. Another folder of a file is not."""
    (tmp_path / "a.yaml").write_text("a: 1\n")
    (tmp_path / "moved.yaml").write_text("a: 1\n")
    run = replace(scripted_run(tmp_path), config=(str(tmp_path / "a.yaml"),), settings=("--trainer.max_epochs=5",))
    assert state_of(run) == "finished"
    with pytest.raises(SettingError, match=r"popo-seed1.*trainer.max_epochs 5, now 6.*another root, or delete"):
        is_finished(replace(run, settings=("--trainer.max_epochs=6",)))
    with pytest.raises(SettingError, match=r"data.group_size not there, now 4"):
        is_finished(replace(run, settings=(*run.settings, "--data.group_size=4")))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "a.yaml").write_text("a: 1\n")
    assert is_finished(replace(run, config=(str(tmp_path / "moved" / "a.yaml"),)))
    (tmp_path / "a.yaml").write_text("a: 2\n")
    with pytest.raises(SettingError, match=r"another file a.yaml"):
        is_finished(run)
    foreign = scripted_run(tmp_path, seed=2)
    foreign.folder.mkdir()
    (foreign.folder / "metrics.csv").write_text("step\n")
    with pytest.raises(SettingError, match="did not begin"):
        run_all([foreign], print, lambda run: "")


def test_refusal_comes_before_the_first_run(tmp_path: Path) -> None:
    first, second = scripted_run(tmp_path, seed=1), scripted_run(tmp_path, seed=2)
    second.folder.mkdir()
    write_record(replace(second, settings=("--run.method=other",)))
    with pytest.raises(SettingError):
        run_all([first, second], print, lambda run: "")
    assert not first.folder.exists()


def test_a_run_is_not_made_twice_at_once(tmp_path: Path) -> None:
    """While one process makes a run, another process leaves it alone. When the first dies, the lock is free."""
    run = scripted_run(tmp_path, "import time; time.sleep(60)")
    run.folder.mkdir()
    code = (
        "import sys; from pathlib import Path; from popo_lightning.cli.compare.runs import locked\n"
        "with locked(Path(sys.argv[1])) as lock:\n    print(lock is not None, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert state_of(run) == "elsewhere"
        assert read_record(run.folder) is None, "the other one's folder is not touched"
    finally:
        holder.kill()
        holder.communicate()
    assert state_of(scripted_run(tmp_path)) == "finished"


def test_an_orphan_keeps_its_lock(tmp_path: Path) -> None:
    """If popo compare is killed before it can stop its run, no other process starts that run until it ends."""
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    run = scripted_run(tmp_path)
    comparing = compare_process(tmp_path, script)
    log = run.folder / "log.txt"
    wait_for(lambda: log.exists() and log.read_text().splitlines()[1:] != [])
    orphan = int(log.read_text().splitlines()[1])
    comparing.kill()
    comparing.wait()
    assert is_held(run.folder)
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: not is_held(run.folder))


@pytest.mark.parametrize("request_", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_stops_the_run_and_its_children(request_: signal.Signals, tmp_path: Path) -> None:
    grandchild = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    run = scripted_run(tmp_path)
    comparing = compare_process(tmp_path, grandchild + "print(p.pid, flush=True); p.wait()")
    log = run.folder / "log.txt"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 1)
    pid = int(log.read_text().splitlines()[1])
    comparing.send_signal(request_)
    assert comparing.wait(50) == STOPPED
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1])
    assert not (tmp_path / "popo-seed2").exists()
    assert not is_held(run.folder)


# -- several at once -------------------------------------------------------------------------------------------

# Writes a note at its start, and ends when as many notes exist as runs are to run together.
MEET = (
    "import pathlib, sys, time; here = pathlib.Path(sys.argv[1]); (here / 'began').touch(); until = time.time() + 50\n"
    "while len(list(here.parent.glob('*/began'))) < {together} and time.time() < until: time.sleep(0.02)\n"
    "assert time.time() < until; (here / 'summary.json').write_text('{{}}')"
)


def test_several_are_under_way_together_and_begin_in_order(tmp_path: Path) -> None:
    """Two of three runs overlap. The third starts when one of them has ended, and keeps its number of three."""
    runs = [scripted_run(tmp_path, MEET.format(together=2), seed) for seed in (1, 2, 3)]
    lines: list[str] = []
    outcomes = run_all(runs, lines.append, lambda run: "0.5", at_once=2)
    assert [outcome.state for outcome in outcomes] == ["finished"] * 3
    begun = [line.split(":")[0] for line in lines if "started" in line]
    assert begun == [f"[{n} of 3] popo, seed {n}" for n in (1, 2, 3)]
    third = next(place for place, line in enumerate(lines) if "seed 3: started" in line)
    assert sum("0.5" in line for line in lines[:third]) >= 1, "no more than two at once"
    assert {outcome.run.seed for outcome in outcomes} == {1, 2, 3}


# Writes a note while it runs, and prints how many notes there are.
COUNT = (
    "import pathlib, sys, time; here = pathlib.Path(sys.argv[1]); mine = here.parent / (here.name + '.now')\n"
    "mine.touch(); time.sleep(0.3); print(len(list(here.parent.glob('*.now')))); mine.unlink()\n"
    "(here / 'summary.json').write_text('{}')"
)


def test_never_more_than_asked_for(tmp_path: Path) -> None:
    runs = [scripted_run(tmp_path, COUNT, seed) for seed in range(5)]
    run_all(runs, print, lambda run: "", at_once=2)
    seen = [int((run.folder / "log.txt").read_text().splitlines()[-1]) for run in runs]
    assert max(seen) <= 2


def test_a_failure_beside_others_stops_none(tmp_path: Path) -> None:
    runs = [
        scripted_run(tmp_path, "import sys; sys.exit(3)", 1),
        scripted_run(tmp_path, "import time, pathlib, sys; time.sleep(0.6)\n" + FINISH, 2),
        scripted_run(tmp_path, seed=3),
    ]
    outcomes = {outcome.run.seed: outcome for outcome in run_all(runs, print, lambda run: "", at_once=3)}
    assert {seed: outcome.state for seed, outcome in outcomes.items()} == {1: "failed", 2: "finished", 3: "finished"}
    assert run_all(runs[1:], print, lambda run: "", at_once=3) == [], "finished ones are not made again"


def test_a_run_that_takes_too_long_is_stopped_and_the_others_go_on(tmp_path: Path) -> None:
    runs = [scripted_run(tmp_path, "import time; time.sleep(60)", 1), scripted_run(tmp_path, seed=2)]
    began = time.monotonic()
    outcomes = run_all(runs, print, lambda run: "", at_once=1, seconds_per_run=1.0)
    assert time.monotonic() - began < 50
    assert [outcome.state for outcome in outcomes] == ["failed", "finished"]
    assert "seconds_per_run (1 s)" in outcomes[0].reason
    assert not is_held(runs[0].folder)


def test_stopping_stops_all_that_are_under_way(tmp_path: Path) -> None:
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    comparing = compare_process(tmp_path, script, "2", script)
    logs = [tmp_path / f"popo-seed{seed}" / "log.txt" for seed in (1, 2)]
    wait_for(lambda: all(log.exists() and len(log.read_text().splitlines()) > 1 for log in logs))
    pids = [int(log.read_text().splitlines()[1]) for log in logs]
    comparing.send_signal(signal.SIGINT)
    assert comparing.wait(50) == STOPPED
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert not any(is_held(log.parent) for log in logs)


# -- the real thing --------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the environment of the processes that popo compare starts."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(TESTS)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_real_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One method trains. A second one fails by a setting that only fit can refuse, which does not harm the report."""
    arguments = {"trainer.max_epochs": 2, "evaluation.every_n_iterations": 1}
    methods = method_files("popo") | {"broken": {"arguments": {"evaluation.avg_k": 99}}}
    path = write_comparison(tmp_path, methods, task=[str(config)], seeds=[1], baseline=None, arguments=arguments)
    assert main(["--config", str(path), "--plots", "false"]) == 1
    said = capsys.readouterr()
    assert "[1 of 2] popo, seed 1: " in said.out
    assert "avg@2" in said.out
    assert "evaluation.avg_k is 99" in said.out, "the end of the failed run's log"
    assert "1 of 2 runs failed" in said.err
    run = tmp_path / "root" / "runs" / "popo-seed1"
    assert [row["step"] for row in metrics(run) if "train/loss" in row] == [1, 2]
    assert json.loads((run / "summary.json").read_text())["method"] == "popo"
    report = (tmp_path / "root" / "report.md").read_text("utf-8")
    assert "1 finished runs" in report
    assert "broken, seed 1: ended with exit code 2" in report
    assert "12 problems, 2 samples" in report


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_interrupted_comparison_goes_on(config: Path, tmp_path: Path) -> None:
    """popo compare is stopped in the middle of a run. The same command then finishes it as without the stop."""
    arguments = {"trainer.max_epochs": 40, "evaluation.every_n_iterations": 20, "checkpoint.every_n_epochs": 2}
    path = write_comparison(
        tmp_path, method_files("popo"), task=[str(config)], seeds=[1], baseline=None, arguments=arguments
    )
    command = [sys.executable, "-m", "popo_lightning", "compare", "--config", str(path), "--plots", "false"]
    run = tmp_path / "root" / "runs" / "popo-seed1"
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: bool(list((run / "checkpoints").glob("*.ckpt"))), 120)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "interrupted ones continue with: popo compare --config" in said
    assert not (run / "summary.json").exists()
    done = len([row for row in metrics(run) if "train/loss" in row])
    assert 0 < done < 40, "it was stopped too late for this test"
    subprocess.run(command, check=True, timeout=200)
    subprocess.run([*command, "--root", str(tmp_path / "whole")], check=True, timeout=200)
    assert metrics(run) == metrics(tmp_path / "whole" / "runs" / "popo-seed1")
    assert "resume" in (run / "log.txt").read_text()
