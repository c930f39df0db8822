"""The messages in a terminal at the beginning and at the end of a run."""

from __future__ import annotations

import io
import shlex
import time
from pathlib import Path

import pytest
from helpers.tiny_models import method, popo
from rich.console import Console

from popo_lightning.callbacks.progress_lines import Course, bar
from popo_lightning.core.work import Work


def test_what_a_run_says_from_the_first_line_to_the_last(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    command = ["fit", "--config", config, *method("popo"), "--run.folder", run]
    popo(*command, "--trainer.max_epochs", "1")
    lines = capsys.readouterr().err.splitlines()
    start = lines.index("loading the policy, starting TransformersEngine")
    (evaluated,) = (place for place, line in enumerate(lines) if "evaluation after iteration 0" in line)
    assert start < lines.index(f"popo: writes to '{run}'") < evaluated
    (line,) = (line for line in lines if line.startswith("iteration 1/1"))
    assert [word for word in ("elapsed 0:0", "s/iteration ", "ETA 0:00:00", "reward 0.") if word not in line] == []
    block = dict(line.split("  ", 1) for line in lines[-6:])
    assert block["run folder"].strip() == f"'{run}'"
    assert block["checkpoint"].strip() == f"'{run / 'checkpoints' / 'iteration-0001.ckpt'}'"
    assert f"popo export '{run}' '{run / 'exported'}'" in block["export"]
    assert f"popo show '{run}'" in block["look inside"] and f"tensorboard --logdir '{run}'" in block["curves"]
    # the command of the block continues the run and says so
    longer = shlex.split(block["train on"])
    assert longer[:2] == ["popo", "fit"]
    popo(*longer[1:])
    lines = capsys.readouterr().err.splitlines()
    newest = run / "checkpoints" / "iteration-0001.ckpt"
    assert f"popo: continues from '{newest}', after 1 of 2 iterations" in lines
    with pytest.raises(SystemExit) as ended:
        popo(*longer[1:])
    assert ended.value.code == 0 and f"the run in '{run}' is finished (2 iterations" in capsys.readouterr().err


def test_a_refused_run_announces_nothing_and_one_without_a_method_names_its_parts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", config, "--run.root", tmp_path, "--trainer.max_epochs", "1"]
    popo(*command)
    said = capsys.readouterr().err
    (line,) = (line for line in said.splitlines() if "no method is named" in line)
    assert "the defaults: data.composer OnPolicy, model.advantage GroupNormalized" in line
    with pytest.raises(SystemExit) as refused:
        popo(*command, "--evaluation.benchmarks", "{nosuch: {samples: 3}}")
    said = capsys.readouterr().err
    assert (
        refused.value.code == 2
        and "nosuch" in said
        and "belongs to another run" not in said
        and "writes to" not in said
    )
    popo(*command)
    said = capsys.readouterr().err
    assert "belongs to another run, so this one writes to" in said


def test_times_by_hand() -> None:
    now = 100.0
    course = Course(10, 4, lambda: now)
    assert course.values() == {"iteration": "4/10", "elapsed": "0:00:00"}
    now = 106.0
    course.advance(6)
    assert course.values() == {"iteration": "6/10", "elapsed": "0:00:06", "s/iteration": "3.0", "ETA": "0:00:12"}
    now = 108.0  # two seconds into the seventh iteration
    assert course.values()["ETA"] == "0:00:10" and course.values()["elapsed"] == "0:00:08"
    assert Course(0).values() == {"iteration": "0", "elapsed": "0:00:00"}


def test_the_bar_has_iterations_times_and_the_present_work() -> None:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(bar(None, "starting VLLMEngine", {}, time.perf_counter() - 75))
    course = Course(8, 0, iter([0.0, 6.0, 7.0, 7.0, 7.0, 7.0]).__next__)
    course.advance(3)
    work = Work()
    told: list[str] = []
    work.changed = lambda: told.append(str(work))
    with work.named("evaluating held_out (greedy)"):
        work.advance(120, 500)
        console.print(bar(course, str(work), {"reward": "0.125"}, 0.0))
    first, second, third, fourth = (line.rstrip() for line in console.export_text().splitlines())
    assert first == "0:01:15  starting VLLMEngine"
    assert second.startswith("iteration 3/8") and "ETA 0:00:0" in second and "2.0" in second
    assert second.endswith("evaluating held_out (greedy) 120/500")
    assert third.strip() == "reward" and fourth.strip() == "0.125"
    assert told == ["evaluating held_out (greedy)", "evaluating held_out (greedy) 120/500", "sampling"]


def test_a_run_without_checkpoints_offers_nothing_that_cannot_work(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = ["--checkpoint.save_top_k", "0", "--trainer.max_epochs", "1", "--run.folder", tmp_path]
    popo("fit", "--config", config, *method("popo"), *none)
    assert "popo export" not in capsys.readouterr().err
