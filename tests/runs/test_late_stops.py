"""A run that is told to stop during its last evaluation stops. When resumed it makes that evaluation again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.nodes import one_node
from helpers.tiny_models import SignalWhileSampling, method, metrics, popo

from popo_lightning.callbacks.summary import Summary
from popo_lightning.evaluation import callback as evaluation
from runs.test_resume import checkpoint
from runs.test_resumed_ends import assert_whole
from runs.test_stopping import two_rank_command

Args = list[str | Path]
ITERATIONS, STEPS = 3, 9
ENGINE = ["--data.engine", "runs.test_late_stops.Swallows", "--data.engine.number", str(int(signal.SIGTERM))]
LAST_CALL = 9  # three iterations, and a greedy and a sampled call in each of three evaluations


class Swallows(SignalWhileSampling):
    """Loses any exception that a signal raises, as a destructor or a library's callback may."""

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        try:
            yield from super().stream(*args, **kwargs)
        except BaseException as error:
            if isinstance(error, GeneratorExit):
                raise
            yield from super().stream(*args, **kwargs)


@pytest.fixture(scope="module")
def command(config: Path) -> Args:
    return ["fit", "--config", config, *method("popo"), "--trainer.max_epochs", str(ITERATIONS)]


@pytest.fixture(scope="module")
def whole(command: Args, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    popo(*command, "--run.folder", folder)
    return folder


def signals_once(function: Callable[..., Any], is_due: Callable[..., bool]) -> Callable[..., Any]:
    """Wraps a function so that the process gets a signal before one of its calls."""
    sent: list[int] = []

    def called(*args: Any) -> Any:
        if not sent and is_due(*args):
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    return called


def after_sampling(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    at_the_end = lambda trainer, *_: trainer.datamodule.iteration == ITERATIONS  # noqa: E731
    monkeypatch.setattr(evaluation, "measured", signals_once(evaluation.measured, at_the_end))
    return []


def before_the_summary(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    finish = evaluation.Evaluation._finish
    last = lambda self, trainer, *_: trainer.datamodule.iteration == ITERATIONS  # noqa: E731
    monkeypatch.setattr(evaluation.Evaluation, "_finish", signals_once(finish, last))
    return []


def swallowed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [*ENGINE, "--data.engine.call", str(LAST_CALL)]


@pytest.mark.parametrize("late", [after_sampling, before_the_summary, swallowed])
def test_stopped_in_the_last_evaluation(
    command: Args, whole: Path, tmp_path: Path, late: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        how = late(patched)
        with pytest.raises(SystemExit) as ended:
            popo(*command, *how, "--run.folder", tmp_path)
    assert ended.value.code == 143
    saved = checkpoint(tmp_path, STEPS)
    said = capsys.readouterr().err
    assert f"stopped by SIGTERM after iteration {ITERATIONS}, which {saved} holds; continue by" in said
    assert not (tmp_path / "summary.json").exists()
    popo(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert_whole(tmp_path, whole)


def test_a_signal_that_comes_when_all_is_done(
    command: Args, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Summary, "_content", signals_once(Summary._content, lambda *_: True))
    popo(*command, "--run.folder", tmp_path)
    assert_whole(tmp_path, whole)
    assert "popo: SIGTERM came when the run was at its end; nothing is left to do" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_stop_in_the_last_evaluation(config: Path, tmp_path: Path) -> None:
    """The signal comes in the only benchmark, after which nothing is sampled."""
    command = two_rank_command(config, "ddp")
    one_node(2, *command, "--run.folder", tmp_path / "whole", seconds=300)
    engine = ["--data.engine", "helpers.tiny_models.SignalWhileSampling", "--data.engine.call", "6"]
    engine += ["--data.engine.number", str(int(signal.SIGTERM))]
    with pytest.raises(AssertionError, match="stopped by SIGTERM after iteration 2, which"):
        one_node(2, *command, *engine, "--run.folder", tmp_path / "resumed", seconds=300)
    assert not (tmp_path / "resumed" / "summary.json").exists()
    one_node(2, *command, "--run.folder", tmp_path / "resumed", "--run.resume", "true", seconds=300)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
