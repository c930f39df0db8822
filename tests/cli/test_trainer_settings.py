"""Trainer settings that a run would ignore, or that would put its iterations out of step, are refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from helpers.places import REPOSITORY
from helpers.tiny_models import method, metrics, popo
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins import AsyncCheckpointIO

from popo_lightning.callbacks.time_limit import at_the_end_of_an_iteration
from popo_lightning.cli.compare.checking import ParsedOnly
from popo_lightning.cli.trainer_settings import (
    FIXED,
    check_callbacks,
    check_root,
    check_trainer,
)
from popo_lightning.core.errors import SettingError

TASK = str(REPOSITORY / "configs" / "task" / "countdown_tiny.yaml")


@pytest.fixture(scope="module")
def settings() -> Any:
    """Returns the trainer's settings as the command line parses them."""
    return ParsedOnly(["fit", "--config", TASK]).config["fit"].trainer


REFUSED: dict[str, tuple[list[Any], str]] = {
    "max_steps": ([2, 0], "trainer.max_epochs"),
    "min_steps": ([1], "trainer.min_epochs"),
    "limit_train_batches": ([1, 0.5, 0], "data.minibatches"),
    "overfit_batches": ([1, 0.5, 1.0], "data.task"),
    "fast_dev_run": ([True, 2], "trainer.max_epochs"),
    "limit_val_batches": ([0, 1, 0.5], "evaluation.limit"),
    "limit_test_batches": ([1, 0.5], "evaluation.limit"),
    "limit_predict_batches": ([1], "evaluation.limit"),
    "val_check_interval": ([1, 0.5, "00:00:01:00"], "evaluation.every_n_iterations"),
    "check_val_every_n_epoch": ([2, None], "evaluation.every_n_iterations"),
    "num_sanity_val_steps": ([2, -1], "evaluation.at_start"),
    "reload_dataloaders_every_n_epochs": ([1], "every iteration"),
    "use_distributed_sampler": ([True], "benchmarks"),
    "sync_batchnorm": ([True], "batch norms"),
    "gradient_clip_val": ([1.0, 0.0], "model.max_grad_norm"),
    "gradient_clip_algorithm": (["norm"], "model.max_grad_norm"),
    "accumulate_grad_batches": ([2], "data.minibatches"),
    "enable_checkpointing": ([False], "checkpoint.save_top_k"),
    "barebones": ([True], "leave it out"),
    "max_epochs": ([0, -2, None], "iterations"),
    "min_epochs": ([301], "trainer.max_epochs"),
}


def changed(settings: Any, **others: Any) -> Any:
    return SimpleNamespace(**{**vars(settings), **others})


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_a_run_does_not_obey(name: str, settings: Any) -> None:
    check_trainer(settings)
    values, remedy = REFUSED[name]
    for value in values:
        with pytest.raises(SettingError) as refused:
            check_trainer(changed(settings, **{name: value}))
        sentence = str(refused.value)
        assert f"trainer.{name} is {value}" in sentence and remedy in sentence and "\n" not in sentence


def test_lightnings_own_defaults_are_fine(settings: Any) -> None:
    """Lightning's defaults for fixed settings are accepted. All fixed settings exist in this version of Lightning."""
    own = inspect.signature(L.Trainer.__init__).parameters
    assert FIXED.keys() <= REFUSED.keys()
    for name in FIXED.keys() - {"use_distributed_sampler"}:
        check_trainer(changed(settings, **{name: own[name].default}))
    for name in ("limit_train_batches", "limit_val_batches", "val_check_interval"):
        check_trainer(changed(settings, **{name: 1.0}))
    check_trainer(changed(settings, max_epochs=-1, min_epochs=5))
    check_trainer(changed(settings, overfit_batches=0, fast_dev_run=0, num_sanity_val_steps=None))


def test_callbacks_and_plugins_that_put_a_run_out_of_step() -> None:
    refused: list[Any] = [
        GradientAccumulationScheduler({1: 2}),
        StochasticWeightAveraging(0.1),
        BatchSizeFinder(),
        LearningRateFinder(),
        Timer("00:01:00:00"),
    ]
    for callback in refused:
        with pytest.raises(SettingError, match=rf"trainer.callbacks has .*{type(callback).__name__}"):
            check_callbacks([callback], None)
    check_callbacks([Timer("00:01:00:00", interval="epoch")], None)
    with pytest.raises(SettingError, match="AsyncCheckpointIO"):
        check_callbacks([], AsyncCheckpointIO())


def test_a_folder_that_would_not_be_written_into() -> None:
    for folder in (None, "elsewhere"):
        with pytest.raises(SettingError, match=r"trainer.default_root_dir is 'here', .*run.folder"):
            check_root("here", folder)
    check_root(None, None)
    check_root("here", "here")  # as in a config.yaml of an earlier version


def test_a_folder_on_the_command_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, "--trainer.default_root_dir", "elsewhere")
    assert stopped.value.code == 2
    assert "trainer.default_root_dir is 'elsewhere'" in capsys.readouterr().err


def test_a_time_that_is_none() -> None:
    for wrong in ("soon", "5"):
        with pytest.raises(SettingError, match="DD:HH:MM:SS"):
            at_the_end_of_an_iteration(wrong)


def test_a_time_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run, and one that begins from another's checkpoint, have it anew."""
    clock = iter((100.0, 700.0, 700.0, 5000.0))
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: next(clock))
    before, after = (at_the_end_of_an_iteration("00:00:10:00") for _ in range(2))
    before.on_train_start(None, None)  # type: ignore[arg-type]
    after.load_state_dict(before.state_dict())
    assert (before.time_remaining(), after.time_remaining()) == (0, 600)


def test_a_timer_stops_after_a_whole_iteration(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml keeps the time limit and does not keep a folder that a new run would refuse."""
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage=None: 1e9 if any(self._start_time.values()) else 0.0)
    limit = ["--trainer.max_time", "00:01:00:00", "--trainer.max_epochs", "4", "--evaluation.every_n_iterations", "0"]
    cli = popo("fit", "--config", config, *method("popo"), "--run.folder", tmp_path, *limit)
    assert cli.datamodule.iteration == 1 and cli.trainer.global_step == 3 and not cli.datamodule.pending
    assert [row["step"] for row in metrics(tmp_path) if "train/loss" in row] == [1]
    assert "after iteration 1 of 4, by trainer.max_time: it has trained for" in capsys.readouterr().err
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]
    assert written["max_time"] == "00:01:00:00" and written["default_root_dir"] is None


def test_the_profiler_says_what_it_found(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    once = ["--run.folder", tmp_path, "--trainer.max_epochs", "1", "--evaluation.every_n_iterations", "0"]
    popo("fit", "--config", config, *once, "--trainer.profiler", "simple")
    assert "Profiler Report" in caplog.text


def test_steps_and_epochs_between_checkpoints(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        popo("fit", "--config", config, "--checkpoint.every_n_train_steps", "3")
    assert "checkpoint.every_n_train_steps is 3 beside checkpoint.every_n_epochs" in capsys.readouterr().err
