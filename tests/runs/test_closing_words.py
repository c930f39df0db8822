"""What a run says about its checkpoints at its end: it promises none that is missing or not worth resuming."""

from __future__ import annotations

import shlex
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from helpers.tiny_models import method, popo
from lightning.pytorch.callbacks import Timer

from popo_lightning.callbacks.broken_policy import BrokenPolicyDetector
from popo_lightning.callbacks.checkpoints import Checkpoints
from popo_lightning.callbacks.closing_block import closing_block
from popo_lightning.callbacks.closing_words import SavedSoFar
from popo_lightning.callbacks.early_stops import EarlyStops
from popo_lightning.callbacks.run_keeper import RunKeeper
from popo_lightning.callbacks.time_limit import TimeLimit
from popo_lightning.runs.continue_command import without_options
from popo_lightning.runs.record import new_record
from runs.test_checkpoints import full_disk as full_disk
from runs.test_checkpoints import steps_of
from runs.test_stopping import at

Args = list[str | Path]


@pytest.fixture(scope="module")
def command(config: Path) -> Args:
    quick = ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", "0", "--evaluation.samples", "0"]
    return ["fit", "--config", config, *method("popo"), *quick, "--evaluation.limit", "2"]


def ended(*args: str | Path) -> int:
    """Returns the exit code of a command."""
    try:
        popo(*args)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Returns the messages of a run, without where it writes and where it continues from."""
    lines = [line.removeprefix("popo: ") for line in capsys.readouterr().err.splitlines() if line.startswith("popo: ")]
    return [line for line in lines if not line.startswith(("writes to ", "continues from "))]


# -- a policy that an optimizer step breaks ------------------------------------------------------------------------


def breaking(hook_iteration: int) -> list[str]:
    name = f"{__name__}.Breaks"
    return ["--trainer.callbacks+", name, "--trainer.callbacks.iteration", str(hook_iteration)]


class Breaks(L.Callback):
    """Sets a far too high learning rate in one iteration. Every weight stays finite, but the policy is broken."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 5.0 if batch.version + 1 == self.iteration else 1e-9


def test_a_broken_policy_is_not_recommended(
    command: Args, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The first checkpoint is from after iteration 2. The step in iteration 3 breaks the policy."""
    broken = [*command, *breaking(3), "--trainer.max_epochs", "8", "--checkpoint.every_n_epochs", "2"]
    assert ended(*broken, "--run.folder", tmp_path) == 0
    sound, newest = (tmp_path / "checkpoints" / f"{name}.ckpt" for name in ("iteration-0002", steps_of(tmp_path)[-1]))
    assert steps_of(tmp_path) == [sound.stem, newest.stem] and newest.stem == "iteration-0008"
    (line,) = [line for line in said(capsys) if "right" in line]
    assert line == (
        f"no response has been right since iteration 4; the newest, {newest}, is from after that; before it: {sound}, "
        "which --ckpt_path resumes from"
    )
    (warned,) = [
        record.getMessage() for record in caplog.records if "no response has been right" in record.getMessage()
    ]
    assert warned.startswith("iteration 6: no response has been right since iteration 4")
    # A stopped run says so too, and so does a run that has no sound checkpoint left.
    again = [*command, *breaking(1), "--trainer.max_epochs", "8", "--checkpoint.every_n_epochs", "2"]
    assert ended(*again, *at("on_train_batch_start", 7, 1), "--run.folder", tmp_path / "second") == 130
    found = said(capsys)
    assert any("since iteration 2" in line and "none from before it is left" in line for line in found)
    assert "stopped by SIGINT after iteration 7" in found[-1]


def test_a_sound_policy_is_left_alone(command: Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*command, "--trainer.max_epochs", "5", "--run.folder", tmp_path) == 0
    assert said(capsys) == []


def test_a_broken_policy_is_told_from_chance() -> None:
    broken = BrokenPolicyDetector(3)
    assert (
        not any(broken.see(1.0, iteration) for iteration in range(1, 9)) and not broken.suspected
    )  # none ever was right
    broken = BrokenPolicyDetector(3)
    shares = [0.1, None, 0.2, 1.0, 1.0, 0.1, 1.0, 1.0, None, 1.0, 1.0]
    assert [broken.see(share, place) for place, share in enumerate(shares, 1)] == [False] * 9 + [True, False]
    assert broken.certain and broken.since == 7 and broken.sound_iterations(0) == 5 and broken.sound_iterations(2) == 3
    resumed = BrokenPolicyDetector(3)
    resumed.load_state_dict(broken.state_dict())
    assert resumed.certain and not resumed.see(1.0, 12) and resumed.since == 7
    assert not resumed.see(0.9, 13) and not resumed.suspected
    hard = BrokenPolicyDetector(3)
    assert not any(hard.see(share, place) for place, share in enumerate([0.5, 1.0, 1.0, 0.5, *[1.0] * 5], 1))


# -- checkpoints that cannot be written ----------------------------------------------------------------------------


def test_a_run_of_which_nothing_could_be_saved_ends_in_an_error(
    command: Args, tmp_path: Path, full_disk: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk.room = 0
    every = ["--trainer.max_epochs", "3", "--checkpoint.every_n_epochs", "2"]
    assert ended(*command, *every, "--run.folder", tmp_path) == 1
    (line,) = said(capsys)
    assert line.startswith("2 of 2 checkpoints could not be written, the last for this reason: No space left on device")
    assert "all that is left of this run" in line and (tmp_path / "summary.json").exists()


def test_a_run_of_which_some_could_not_says_so(
    command: Args, tmp_path: Path, full_disk: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is resumed from these checkpoints says so too, and so does a fork that could not save its own."""
    every = ["--trainer.max_epochs", "1", "--checkpoint.every_n_epochs", "1"]
    assert ended(*command, *every, "--run.folder", tmp_path) == 0
    assert said(capsys) == []
    (first,) = (tmp_path / "checkpoints").iterdir()
    full_disk.room = 0
    longer = [*command, "--trainer.max_epochs", "2", "--checkpoint.every_n_epochs", "1"]
    assert ended(*longer, "--run.folder", tmp_path, "--run.resume", "true") == 0
    (line,) = said(capsys)
    assert line.startswith("1 of 1 checkpoints could not be written") and line.endswith("none holds the end of the run")
    assert f"the newest is {first}, which the run resumed from" in line
    fork = ["--ckpt_path", first, "--run.folder", tmp_path / "fork", "--seed_everything", "5"]
    assert ended(*longer, *fork) == 1
    assert "all that is left of this run" in said(capsys)[-1]


class Fills(L.Callback):
    """The disk is full after the first iteration, and has room again at the end."""

    disk: Any = None
    rooms: tuple[int | None, ...] = (None, 0, None)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        Fills.disk.room = Fills.rooms[trainer.current_epoch]


@pytest.mark.parametrize(("rooms", "end"), [((None, 0, None), "2"), ((None, 0, 0), "0")])
def test_some_in_between(
    command: Args,
    tmp_path: Path,
    full_disk: SimpleNamespace,
    rooms: tuple[int | None, ...],
    end: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Fills.disk, Fills.rooms = full_disk, rooms
    every = ["--trainer.max_epochs", "3", "--checkpoint.every_n_epochs", "1"]
    assert ended(*command, *every, "--trainer.callbacks+", f"{__name__}.Fills", "--run.folder", tmp_path) == 0
    (line,) = said(capsys)
    newest = next((tmp_path / "checkpoints").glob(f"iteration-{int(end) + 1:04d}.ckpt"))
    failed = rooms.count(0)
    assert line.startswith(f"{failed} of 3 checkpoints could not be written")
    assert f"the newest is {newest}, after iteration {int(end) + 1}" in line
    assert line.endswith("none holds the end of the run") == (end == "0")


# -- stops after which no run can resume ---------------------------------------------------------------------------


def again_by(line: str) -> list[str]:
    """Returns the command that is named, without the signal."""
    named = shlex.split(line.split(" by: popo ")[1])
    return without_options(named, *(name for name in at("x", 1) if name.startswith("--")))


NOT_KEPT = {
    "none kept": (["--checkpoint.save_top_k", "0"], "nothing is saved, as checkpoint.save_top_k is 0"),
    "weights alone": (
        ["--checkpoint.save_weights_only", "true"],
        "holds its weights alone (checkpoint.save_weights_only)",
    ),
}


@pytest.mark.parametrize("kind", NOT_KEPT)
def test_a_stop_names_a_command_that_works(
    command: Args, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings, words = NOT_KEPT[kind]
    place = ["--run.root", tmp_path / "runs", "--run.folder", tmp_path / "first", "--trainer.max_epochs", "2"]
    assert ended(*command, *settings, *place, *at("on_train_batch_start", 2, 1)) == 130
    found = said(capfd)  # another thread answers the signal, perhaps later
    (last,) = [line for line in found if "stopped by" in line]
    assert not any("can resume from" in line for line in found)
    assert words in last and "--run.resume true" not in last
    assert ("after iteration 2" in last) == (kind == "weights alone")
    assert ended(*again_by(last)) == 0
    assert (tmp_path / "runs" / "tiny" / "popo-seed1" / "summary.json").exists()


def test_a_stop_while_the_disk_is_full(
    command: Args, tmp_path: Path, full_disk: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk.room = 0
    place = ["--run.root", tmp_path / "runs", "--run.folder", tmp_path / "first", "--trainer.max_epochs", "2"]
    assert ended(*command, *place, *at("on_train_batch_start", 2, 1, signal.SIGTERM)) == 143
    last = said(capsys)[-1]
    assert "no checkpoint could be written (No space left on device)" in last
    full_disk.room = None
    assert ended(*again_by(last)) == 0


def test_a_fork_that_is_stopped_before_it_has_saved_anything(
    command: Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command still names the checkpoint it begins from."""
    assert ended(*command, "--trainer.max_epochs", "1", "--run.folder", tmp_path / "first") == 0
    (first,) = (tmp_path / "first" / "checkpoints").iterdir()
    fork = [
        "--ckpt_path",
        first,
        "--run.folder",
        tmp_path / "fork",
        "--seed_everything",
        "5",
        "--trainer.max_epochs",
        "2",
    ]
    engine = ["--data.engine", "helpers.tiny_models.SignalWhileSampling", "--data.engine.call", "1"]
    assert ended(*command, *fork, *engine) == 130
    last = said(capsys)[-1]
    assert f"stopped by SIGINT; {first} is the newest checkpoint; continue by" in last
    kept = without_options(again_by(last), "--data.engine", "--data.engine.call")
    cli = popo(*kept)
    assert cli.trainer.ckpt_path == str(first) and cli.trainer.global_step > 3


# -- the block at the end --------------------------------------------------------------------------------------------


WHOLE: dict[str, Any] = {"newest": "a.ckpt", "where": "iteration 2", "written": 1, "failed": 0, "why": ""}
BLOCKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "whole": ({}, ["export", "train on"]),
    "weights alone": ({"weights_only": True}, ["export"]),
    "none could be written": ({"newest": None, "written": 0, "failed": 2, "why": "No space"}, []),
    "of the run that it began from": ({"written": 0, "forks": True}, []),
    "none since it was resumed": ({"written": 0}, ["export", "train on"]),
    "stopped early": ({"ended": {"iteration": 1, "why": "no gain"}}, ["export"]),
    "out of time": ({"timer": Timer("00:00:00:00")}, ["export"]),
    "out of this process's time": ({"timer": TimeLimit("00:00:00:00")}, ["export", "train on"]),
    "by a metric": ({"monitor": "eval/countdown/greedy"}, ["export", "train on"]),
    "with time left": ({"timer": Timer("01:00:00:00")}, ["export", "train on"]),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_block_has_commands_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    changed, expected = BLOCKS[kind]
    rest = {"of_the_end": True, "off": False, "weights_only": False}
    numbers = WHOLE | rest | {name: value for name, value in changed.items() if name in WHOLE | rest}
    monkeypatch.setattr(Checkpoints, "saved_so_far", lambda *_: SavedSoFar(**numbers))
    record = replace(new_record("task", "method", 1, {}, 1), command="popo fit --seed_everything 3")
    stops = EarlyStops("[]", False)
    stops.load_state_dict({"ended": changed.get("ended")})
    callbacks = [
        RunKeeper(record, lambda _: None, changed.get("forks", False)),
        stops,
        Checkpoints(monitor=changed.get("monitor")),
    ]
    callbacks += [changed["timer"]] if "timer" in changed else []
    once: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": 2, "default_root_dir": tmp_path}
    trainer = L.Trainer(callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, **once)
    block = closing_block(trainer)
    assert [name for name in ("export", "train on") if name in block] == expected
    if "train on" in expected:
        end = f"--run.folder {tmp_path} --run.resume true --trainer.max_epochs 4"
        assert block["train on"] == f"popo fit --seed_everything 3 {end}"
        monkeypatch.setattr(trainer, "datamodule", SimpleNamespace(iteration=1), raising=False)
        assert closing_block(trainer)["train on"].endswith("--trainer.max_epochs 2"), "it has not come to its end"
    assert ("no gain" in block.get("ended early", "")) == (kind == "stopped early")
    best = f"popo export {tmp_path} {tmp_path / 'exported-best'} --best"
    assert block.get("export the best") == (best if kind == "by a metric" else None)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported-2").touch()
    if "export" in expected:
        assert block["export"] == f"popo export {tmp_path} {tmp_path / 'exported'}"
        assert closing_block(trainer)["export"] == f"popo export {tmp_path} {tmp_path / 'exported-3'}"
