"""A run that EarlyStopping has ended ends at once when it is resumed, but continues under other settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli.test_command_line import digests
from helpers.tiny_models import method, metrics, popo

Args = list[str | Path]
WHY = "Monitored metric train/optimizer_steps did not improve in the last 2 records"


def stopping(patience: int, monitor: str = "train/optimizer_steps") -> list[str]:
    """Returns settings of EarlyStopping. Their metric only grows, so it never improves after the first iteration."""
    found = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", monitor]
    return [*found, "--trainer.callbacks.patience", str(patience)]


@pytest.fixture(scope="module")
def command(config: Path) -> Args:
    quick = ["--evaluation.every_n_iterations", "0", "--evaluation.samples", "0", "--evaluation.limit", "3"]
    return ["fit", "--config", config, *method("grpo"), *quick, "--trainer.max_epochs", "7"]


@pytest.fixture(scope="module")
def stopped(command: Args, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    popo(*command, *stopping(2), "--run.folder", folder)
    assert iterations(folder) == 3
    return folder


def iterations(folder: Path) -> int:
    found = int(json.loads((folder / "summary.json").read_text())["iterations"])
    assert max(row["step"] for row in metrics(folder)) == found
    return found


def resumed(folder: Path, *args: str | Path) -> Any:
    return popo(*args, "--run.folder", folder, "--run.resume", "true")


def test_it_ends_at_once(command: Args, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(stopped)
    with pytest.raises(SystemExit) as ended:
        resumed(stopped, *command, *stopping(2))
    assert ended.value.code == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert "was stopped early, after iteration 3" in said and WHY in said and "or leave it out" in said
    assert digests(stopped) | {"run.lock": ""} == before | {"run.lock": ""}


def test_it_makes_what_is_missing_and_no_iteration(
    command: Args, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is killed in the evaluation after its last iteration."""
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    (folder / "summary.json").unlink()
    resumed(folder, *command, *stopping(2))
    assert iterations(folder) == 3 and metrics(folder) == metrics(stopped)
    assert "was stopped early, after iteration 3" in caplog.text and WHY in caplog.text


OTHERS = {"more patience": (stopping(4), 5), "left out": ([], 7), "another monitor": (stopping(2, "train/loss"), 7)}


@pytest.mark.parametrize("kind", OTHERS)
def test_it_goes_on_under_other_settings(command: Args, stopped: Path, tmp_path: Path, kind: str) -> None:
    """With more patience it waits as long as a run that had it from the start."""
    settings, expected = OTHERS[kind]
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    resumed(folder, *command, *settings)
    found = iterations(folder)
    assert found == expected if kind != "another monitor" else 3 < found <= expected


def test_a_fork_waits_anew(command: Args, stopped: Path, tmp_path: Path) -> None:
    (newest,) = (stopped / "checkpoints").iterdir()
    fork = ["--seed_everything", "5", "--ckpt_path", newest, "--run.folder", tmp_path]
    popo(*command, *stopping(2), *fork)
    assert iterations(tmp_path) == 6  # its own first value is its best
