"""EarlyStopping and ModelCheckpoint watch metrics of iterations and evaluations. Unknown names give one sentence."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.nodes import fsdp2
from helpers.places import REPOSITORY
from helpers.tiny_models import method, metrics, popo, popo_process
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from popo_lightning.core.errors import SettingError
from popo_lightning.evaluation.benchmarks import EvalSettings, metric_names
from popo_lightning.metrics.monitors import (
    NAMES,
    OPEN,
    REWARDS,
    check_evaluation_monitors,
    check_monitors,
    consult,
    publish,
    settle_stopping,
)

STOP = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.patience", "2", "--trainer.callbacks.monitor"]


def trainer(*callbacks: Any) -> Any:
    """Returns the parts of a trainer that the tested functions need."""
    return SimpleNamespace(
        callbacks=list(callbacks),
        callback_metrics={},
        should_stop=False,
        is_global_zero=True,
        fast_dev_run=False,
        sanity_checking=False,
        current_epoch=0,
        state=SimpleNamespace(fn="fit"),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all=True: decision),
    )


def test_names_are_those_of_a_run(config: Path, tmp_path: Path) -> None:
    """Every column of metrics.csv is known."""
    popo("fit", "--config", config, *method("popo"), "--run.folder", tmp_path, "--trainer.max_epochs", "4")
    with (tmp_path / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file))) - {"step"}
    settings = EvalSettings(2, 2, (2,), True, 1.0, 1.0, 0, None, 0)
    known = {*NAMES, *REWARDS, *metric_names({"countdown": settings})}
    assert {name for name in columns - known if not OPEN.fullmatch(name)} == set()


def test_documented_names_are_known() -> None:
    """Checks the metric that begins each row of the page. Further names in a row omit the part they share with it."""
    lines = (REPOSITORY / "docs" / "metrics.md").read_text().splitlines()
    named = {found[1] for line in lines if (found := re.match(r"\| `(\w+/\w+)`", line))}
    known = {*NAMES, *REWARDS}
    assert len(named) > 25
    assert {
        name for name in named if not name.startswith("eval/") and name not in known and not OPEN.fullmatch(name)
    } == set()


def test_names_of_an_evaluation_of_several_benchmarks() -> None:
    plain = EvalSettings(4, 2, (1, 4), True, 1.0, 1.0, 0, None, 0)
    other = EvalSettings(8, 4, (4,), True, 1.0, 1.0, 0, None, 0)
    greedy = EvalSettings(0, 2, (2,), True, 1.0, 1.0, 0, None, 0)
    found = metric_names({"a": plain, "b": other})
    assert {"eval/a/avg_at_2", "eval/b/avg_at_4", "eval/mean/greedy", "eval/mean/pass_at_4", "eval/mean/avg"} <= set(
        found
    )
    assert "eval/mean/avg_at_2" not in found and "eval/mean/pass_at_1" not in found
    assert "eval/mean/avg" not in metric_names({"a": plain, "b": greedy})
    assert not any("mean" in name for name in metric_names({"a": plain}))


def test_unknown_monitors_before_a_model_loads() -> None:
    for name, near in {"reward/scor": None, "train/los": "train/loss", "val_loss": "train/value_loss"}.items():
        for callback in (EarlyStopping(name), ModelCheckpoint(monitor=name)):
            if near is None:
                check_monitors(trainer(callback), ours=True)  # a verifier names parts: checked after an iteration
                continue
            with pytest.raises(SettingError, match=rf"'{name}', which is never logged; did you mean {near}\?"):
                check_monitors(trainer(callback), ours=True)
            check_monitors(trainer(callback), ours=False)  # another composer may report it
    check_monitors(trainer(ModelCheckpoint(), EarlyStopping("reward/score"), EarlyStopping("weight/ess_age_3")), True)


def test_monitors_of_evaluations() -> None:
    names = ["eval/countdown/greedy", "eval/countdown/avg_at_4"]
    check = check_evaluation_monitors
    good = ModelCheckpoint(monitor=names[0], every_n_epochs=20)
    check(trainer(good, EarlyStopping(names[1]), EarlyStopping("train/loss")), names, 10)
    with pytest.raises(SettingError, match=r"checkpoint.monitor is 'eval/countdown/gredy', .* eval/countdown/greedy\?"):
        check(trainer(ModelCheckpoint(monitor="eval/countdown/gredy")), names, 10)
    with pytest.raises(SettingError, match="there is eval/countdown/greedy, eval/countdown/avg_at_4"):
        check(trainer(EarlyStopping("eval/other/weather")), names, 10)
    with pytest.raises(SettingError, match=r"evaluation.every_n_iterations is 0"):
        check(trainer(EarlyStopping(names[0])), names, 0)
    for wrong in ({"every_n_epochs": 15}, {"every_n_train_steps": 10}):
        with pytest.raises(SettingError, match="make the second a multiple of the first"):
            check(trainer(ModelCheckpoint(monitor=names[0], **wrong)), names, 10)


def test_a_reward_that_no_iteration_has() -> None:
    watching = trainer(EarlyStopping("reward/scor"))
    metrics = {"reward/score": 0.5, "train/loss": 1.0}
    publish(watching, None, metrics, learned=False)  # too early: no iteration has sampled or trained
    with pytest.raises(SettingError, match=r"'reward/scor', which is never logged; did you mean reward/score\?"):
        publish(watching, None, metrics, learned=True)
    for sometimes in ("weight/replayed_ess", "replay/age_mean", "engine/logp_gap_mean"):
        publish(trainer(EarlyStopping(sometimes)), None, metrics, learned=True)
    publish(trainer(EarlyStopping("reward/scor", strict=False)), None, metrics, learned=True)
    publish(trainer(EarlyStopping("reward/score")), None, {"train/loss": 1.0}, learned=True)  # sampled nothing


def test_patience_counts_measurements() -> None:
    """Patience does not count iterations in which the metric was not measured or nothing was learned."""
    score, ages = EarlyStopping("reward/score", mode="max", patience=2), EarlyStopping("replay/age_mean", patience=9)
    loss = EarlyStopping("train/loss", patience=99)
    watching = trainer(score, ages, loss)
    settle_stopping(watching)
    assert not score._check_on_train_epoch_end
    nothing = {"reward/score": 0.5, "train/loss": math.nan}
    publish(watching, None, nothing | {"replay/age_mean": math.nan}, learned=False)
    assert score.wait_count == 0 and ages.wait_count == 0 and not watching.should_stop
    publish(watching, None, {"reward/score": 0.4, "train/loss": 1.0, "replay/age_mean": 2.0}, learned=True)
    assert score.wait_count == 1 and loss.best_score == 1.0
    publish(watching, None, {"train/loss": 0.9}, learned=True)  # the composer sampled nothing
    assert score.wait_count == 1 and math.isnan(watching.callback_metrics["reward/score"])
    publish(watching, None, {"reward/score": 0.3, "train/loss": 0.8}, learned=True)
    assert watching.should_stop and score.stopped_epoch == 0 and loss.wait_count == 0


def test_divergence_stops_and_nothing_learned_does_not(caplog: pytest.LogCaptureFixture) -> None:
    watching = trainer(EarlyStopping("train/loss"))
    settle_stopping(watching)
    publish(watching, None, {"train/loss": math.nan}, learned=False)
    assert not watching.should_stop
    publish(watching, None, {"train/loss": math.nan}, learned=True)
    assert watching.should_stop
    assert "this iteration is the last" in caplog.text and "not finite" in caplog.text
    consult(watching, None, ["train/loss"])
    assert caplog.text.count("this iteration is the last") == 1


def steps(folder: Path, name: str) -> list[int]:
    return [int(row["step"]) for row in metrics(folder) if name in row]


def test_a_run_stops_at_its_reward(config: Path, tmp_path: Path) -> None:
    """Every reward passes the stopping threshold of 0, so the run stops after its first iteration."""
    command = ["fit", "--config", config, *method("popo"), "--run.folder", tmp_path / "a", *STOP, "reward/score"]
    bound = ["--trainer.callbacks.stopping_threshold", "0", "--trainer.callbacks.mode", "max"]
    popo(*command, *bound)
    assert steps(tmp_path / "a", "train/loss") == [1]  # any reward is above 0
    assert (tmp_path / "a" / "summary.json").exists()


def test_a_run_stops_at_its_evaluation(config: Path, tmp_path: Path) -> None:
    """The patience of 2 is two evaluations or four iterations. The first policy's evaluation does not count."""
    command = ["fit", "--config", config, *method("popo"), "--run.folder", tmp_path / "b", "--trainer.max_epochs", "12"]
    name = "eval/countdown/truncated_frac"
    popo(*command, *STOP, name, "--trainer.callbacks.min_delta", "9")  # the first counts as better than infinity
    assert steps(tmp_path / "b", "train/loss") == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_stops_and_keeps_as_one_never_stopped(config: Path, tmp_path: Path) -> None:
    keep = ["--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "-1", "--checkpoint.monitor", "reward/score"]
    stop = [*STOP, "eval/countdown/greedy", "--trainer.callbacks.min_delta", "9"]
    command = ["fit", "--config", config, *method("popo"), *keep, *stop, "--trainer.max_epochs"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    popo(*command, "9", "--run.folder", whole)
    popo(*command, "3", "--run.folder", cut)
    popo(*command, "9", "--run.folder", cut, "--run.resume", "true")
    assert steps(cut, "train/loss") == steps(whole, "train/loss") == [1, 2, 3, 4, 5, 6]
    names = [sorted(file.name for file in (folder / "checkpoints").iterdir()) for folder in (whole, cut)]
    assert names[0] == names[1] and len(names[0]) == 6


def test_the_best_checkpoint_is_kept(config: Path, tmp_path: Path) -> None:
    keep = ["--checkpoint.every_n_epochs", "2", "--checkpoint.monitor", "eval/countdown/greedy"]
    command = ["fit", "--config", config, *method("popo"), "--run.folder", tmp_path, *keep, "--checkpoint.mode", "max"]
    cli = popo(*command)
    found = {
        int(row["step"]): row["eval/countdown/greedy"] for row in metrics(tmp_path) if "eval/countdown/greedy" in row
    }
    best = max(value for step, value in found.items() if step)
    assert cli.trainer.checkpoint_callback.best_model_score == pytest.approx(best)


@pytest.mark.parametrize(
    "name", ["val_loss", "train/los", "eval/countdown/gredy", "reward/scor"], ids=lambda name: name.replace("/", "-")
)
def test_unknown_monitors_on_the_command_line(
    name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, *method("popo"), "--run.folder", tmp_path, *STOP, name)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("popo: ") and f"'{name}', which is never logged; did you mean" in said


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_stop_together(strategy: str, config: Path, tmp_path: Path) -> None:
    """Only rank 0 has all metrics of an iteration. If another rank continued, it would wait forever."""
    several = ["--trainer.strategy", "ddp"] if strategy == "ddp" else fsdp2(2, whole_checkpoints=True)
    command = ["fit", "--config", config, *method("popo"), *several, "--trainer.devices", "2"]
    command += ["--data.problems_per_iteration", "10", "--run.folder", tmp_path, *STOP, "policy/entropy"]
    finished = popo_process(*command, "--trainer.callbacks.min_delta", "9", "--checkpoint.monitor", "train/loss")
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert "this iteration is the last" in finished.stderr
    assert steps(tmp_path, "train/loss") == [1, 2, 3]
