"""Loggers of trainer.logger get the same values as the run's own loggers. TensorBoard opens on the main charts."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import method, metrics, popo, popo_process
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from popo_lightning.callbacks.tensorboard import LAYOUT, MARGIN, compared_settings
from popo_lightning.core.errors import SettingError
from popo_lightning.metrics.table import loggers
from popo_lightning.runs.record import new_record

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


class KeepingLogger(Logger):
    """A user's logger, which keeps its input in a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)

    name = "keeping"
    version = "1"

    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._write({"settings": dict(params)})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._write({"step": step, **metrics})

    def _write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def command(config: Path, folder: Path, *more: str | Path) -> list[str | Path]:
    return ["fit", "--config", config, *method("popo"), "--run.folder", folder, "--trainer.max_epochs", "2", *more]


def board_of(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    board.Reload()
    return board


# -- further loggers -----------------------------------------------------------------------------------------------


def test_one_of_ones_own_is_added(config: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    logger = ["--trainer.logger", "callbacks.test_loggers.KeepingLogger", "--trainer.logger.path", kept]
    popo(*command(config, tmp_path / "run", *logger))
    told = [json.loads(line) for line in kept.read_text().splitlines()]
    settings = [row["settings"] for row in told if "settings" in row]
    assert len(settings) == 1 and settings[0]["method"] == "popo"
    assert settings[0]["data.composer.class_path"] == "popo_lightning.methods.popo.PrioritizedGroupReplay"
    rows: dict[float, dict[str, float]] = {}
    for row in told:
        if "step" in row:
            rows.setdefault(row["step"], {}).update(row)
    own = metrics(tmp_path / "run")
    assert {row["step"] for row in own} == {0, 1, 2}
    for row in own:
        there = {name: value for name, value in row.items() if value == value}
        assert {name: rows[row["step"]][name] for name in there} == pytest.approx(there, rel=1e-6)
    assert "reward/score" in board_of(tmp_path / "run").Tags()["scalars"]


def test_several_are_added_in_their_order(tmp_path: Path) -> None:
    further = [CSVLogger(tmp_path / "other"), KeepingLogger(str(tmp_path / "kept"))]
    assert loggers(tmp_path, None, further)[2:] == further
    assert loggers(tmp_path, None, iter(further))[2:] == further
    assert loggers(tmp_path, None, further[1])[2:] == further[1:]
    for none in (True, None, []):
        assert [type(each).__name__ for each in loggers(tmp_path, None, none)] == ["MetricsTable", "TensorBoardLogger"]


def test_false_switches_all_off(config: Path, tmp_path: Path) -> None:
    popo(*command(config, tmp_path, "--trainer.logger", "false"))
    assert not (tmp_path / "metrics.csv").exists() and (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_runs_own_files_are_not_written_over(kind: type, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"trainer.logger is a {kind.__name__} that writes to .*own folder"):
        loggers(tmp_path, None, kind(tmp_path, name="", version=""))
    assert len(loggers(tmp_path, None, kind(tmp_path, name="other", version=""))) == 3


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_package_is_one_sentence(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        popo(*command(config, tmp_path / "run", "--trainer.logger", "WandbLogger"))
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"popo: WandbLogger needs the package wandb, which is not installed: pip install 'wandb.*'", said
    )
    assert not (tmp_path / "run" / "metrics.csv").exists()


@needs_wandb
def test_wandb_offline_is_added(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = ["--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true"]
    done = popo_process(*command(config, tmp_path / "run", *logger, "--trainer.logger.save_dir", tmp_path))
    assert done.returncode == 0, done.stderr
    assert {row["step"] for row in metrics(tmp_path / "run")} == {0, 1, 2}
    written = next((tmp_path / "wandb").glob("offline-run-*/*.wandb")).read_bytes()
    assert b"reward/score" in written and b"data.composer.class_path" in written


# -- TensorBoard ---------------------------------------------------------------------------------------------------


def test_tensorboard_has_a_layout_settings_and_final_metrics(config: Path, tmp_path: Path) -> None:
    popo(*command(config, tmp_path))
    board = board_of(tmp_path)
    scalars = board.Tags()["scalars"]
    layout = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    seen = {
        title: [name for name in scalars if any(re.match(pattern, name) for pattern in chart.multiline.tag)]
        for title, chart in charts.items()
    }
    assert seen["effective and replayed share"] == ["replay/share", "rollout/effective_share"]
    assert sorted(seen["held-out accuracy"]) == [
        "eval/countdown/avg_at_2",
        "eval/countdown/greedy",
        "eval/countdown/pass_at_2",
    ]
    assert {"weight/ess_age_1", "weight/replayed_ess"} <= set(seen["effective sample size by age"])
    assert {"time/generate", "time/train"} <= set(seen["seconds by phase"])
    assert all(
        name in scalars
        for margin in charts["median weight within the 5th and 95th percentile"].margin.series
        for name in (margin.value, margin.lower, margin.upper)
    )
    kept = {
        name: board.SummaryMetadata(name).plugin_data.content for name in board.Tags()["tensors"] + hparam_tags(board)
    }
    experiment, started, ended = (
        plugin_data_pb2.HParamsPluginData.FromString(kept[f"_hparams_/{name}"])
        for name in ("experiment", "session_start_info", "session_end_info")
    )
    names = [info.name.tag for info in experiment.experiment.metric_infos]
    assert {"reward/score", "eval/countdown/greedy"} <= set(names) <= set(scalars)
    told = started.session_start_info.hparams
    assert told["method"].string_value == "popo" and told["data.composer"].string_value == "PrioritizedGroupReplay"
    assert told["model.optimizer.lr"].number_value > 0 and ended.session_end_info.status == 1  # success


def hparam_tags(board: EventAccumulator) -> list[str]:
    return list(board.PluginTagToContent("hparams"))


def test_every_metric_of_the_layout_is_one(config: Path, tmp_path: Path) -> None:
    """Checks the layout against the known metric names, so that a renamed metric does not leave an empty chart."""
    from popo_lightning.metrics.monitors import NAMES, REWARDS

    known = [*NAMES, *REWARDS, "weight/ess_age_1", "weight/share_age_1", "eval/a/greedy"]
    for charts in LAYOUT.values():
        for title, (kind, wanted) in charts.items():
            for each in wanted:
                found = [name for name in known if (name == each if kind == MARGIN else re.match(each, name))]
                assert found, (title, each)


def test_compared_settings_are_short() -> None:
    settings = {
        "model.path": '"folder"',
        "model.optimizer.class_path": '"torch.optim.AdamW"',
        "model.optimizer.init_args.betas": "[0.9, 0.98]",
        "model.optimizer.init_args.foreach": "null",
        "data.group_size": "4",
        "data.max_new_tokens": "24",
        "data.composer.buffer.max_age": "8",
        "model.behave_weight.correct_fresh": "false",
    }
    assert compared_settings(new_record("task", "popo", 3, settings, None)) == {
        "task": "task",
        "method": "popo",
        "seed": 3,
        "model.optimizer": "AdamW",
        "model.optimizer.betas": "[0.9, 0.98]",
        "data.group_size": 4,
        "data.composer.buffer.max_age": 8,
        "model.behave_weight.correct_fresh": False,
    }
