"""Where a training writes and where it continues from: no run replaces another, and none starts over silently."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from popo_lightning.core.errors import SettingError
from popo_lightning.runs.claim import claim
from popo_lightning.runs.evaluation_start import folder_of_run, settle_evaluation
from popo_lightning.runs.record import RunRecord, checkpoint_every, decisive_settings, new_record, read_record
from popo_lightning.runs.resume import RunFinished
from popo_lightning.runs.start import Start, settle
from popo_lightning.runs.wanted_run import RunSettings, WantedRun
from runs.test_run_folder import write_checkpoint

SETTINGS = {"model.lr": "0.1", "data.async_level": "0"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def wanted(root: Path, method: str = "popo", seed: int = 3, **changes: Any) -> WantedRun:
    settings = SETTINGS | changes.pop("settings", {})
    record = new_record("countdown", method, seed, settings, changes.pop("every", 2))
    plain = {"folder": None, "resume": False, "checkpoint": None, "checkpoints": None, "max_epochs": 10}
    return WantedRun(root=str(root), record=record, **plain | changes)


def settled(command: WantedRun) -> Start:
    """Settles a command and releases its claims, as a process does at its end."""
    with ExitStack() as claims:
        return settle(command, claims)


def checkpoint_of(start: Start, iteration: int, at: float = 0, folder: Path | None = None) -> Path:
    kept = {"run": start.record.to_plain(), "folder": str(start.folder)}
    evaluated = {"history": [{"iteration": 0}]}
    place = folder or start.checkpoints
    path = write_checkpoint(place / f"epoch={iteration - 1}.ckpt", iteration, RunKeeper=kept, Evaluation=evaluated)
    if at:
        os.utime(path, (at, at))
    return path


def made(start: Start, *iterations: int, summary: int | None = None) -> Start:
    """Writes a run's files: its record, metrics and checkpoints after these iterations."""
    start.record.write(start.folder)
    rows = "".join(f"{step},1.0\n" for step in range((max(iterations) if iterations else 0) + 1))
    (start.folder / "metrics.csv").write_text(f"step,train/loss\n{rows}")
    for place, iteration in enumerate(iterations):
        checkpoint_of(start, iteration, at=100 + place)
    if summary is not None:
        (start.folder / "summary.json").write_text(json.dumps({"iterations": summary}))
    return start


def refused(command: WantedRun, *words: str) -> None:
    before = {path: path.read_bytes() for path in Path(command.root).parent.rglob("*") if path.is_file()}
    with pytest.raises(SettingError) as error:
        settled(command)
    for word in words:
        assert word in str(error.value)
    after = {path: path.read_bytes() for path in Path(command.root).parent.rglob("*") if path.is_file()}
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {
        path for path in after if path.name == "run.lock"
    }


# -- new runs -------------------------------------------------------------------------------------------------------


def test_every_run_gets_a_folder_of_its_own_and_says_so(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = root / "countdown"
    first = settled(wanted(root))
    assert first.folder == base / "popo-seed3" and first.checkpoints == first.folder / "checkpoints"
    assert settled(wanted(root)).folder == first.folder  # nothing was written there
    assert not caplog.text
    made(first)
    second = settled(wanted(root))
    assert second.folder == base / "popo-seed3-2" and not caplog.text  # it may still be refused
    assert second.news == (f"'{first.folder}' belongs to another run, so this one writes to '{second.folder}'",)
    (base / "popo-seed3-2" / "checkpoints").mkdir(parents=True)
    assert settled(wanted(root)).folder == base / "popo-seed3-3"
    assert settled(wanted(root, seed=4)).folder == base / "popo-seed4"


def test_runs_that_begin_together_get_folders_of_their_own(root: Path) -> None:
    with ExitStack() as claims:
        folders = [settle(wanted(root), claims).folder.name for _ in range(3)]
        assert folders == ["popo-seed3", "popo-seed3-2", "popo-seed3-3"]
        with pytest.raises(SettingError, match=r"run\.folder is .*, which process \d+ on .* is writing to"):
            settle(wanted(root, folder=root / "countdown" / "popo-seed3"), claims)
    assert settled(wanted(root)).folder.name == "popo-seed3"


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_that_ends_between_the_look_and_the_claim(
    root: Path, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settled(wanted(root))

    def claim_late(folder: Path, setting: str, claims: ExitStack) -> bool:
        if folder == first.folder:
            made(first, 4)
        return claim(folder, setting, claims)

    monkeypatch.setattr("popo_lightning.runs.start.claim", claim_late)
    monkeypatch.setattr("popo_lightning.runs.resume.claim", claim_late)
    if asked:
        with pytest.raises(SettingError, match="holds an earlier run"):
            settled(wanted(root, folder=first.folder))
    else:
        assert settled(wanted(root)).folder.name == "popo-seed3-2"


def test_two_resumptions_at_once(root: Path) -> None:
    run = made(settled(wanted(root)), 4)
    with ExitStack() as claims:
        settle(wanted(root, resume=True), claims)
        for command in (wanted(root, resume=True), wanted(root, checkpoint=run.checkpoints / "epoch=3.ckpt")):
            with pytest.raises(SettingError, match="is writing to; wait until it ends"):
                settle(command, ExitStack())
    assert settled(wanted(root, resume=True)).checkpoint == run.checkpoints / "epoch=3.ckpt"


def test_folder_asked_for_must_be_free(root: Path) -> None:
    mine = root / "mine"
    run = settled(wanted(root, folder=mine))
    assert run.folder == mine
    made(run, 4)
    refused(wanted(root, folder=mine), "run.folder is", "holds an earlier run", "--run.resume true")
    other = made(settled(wanted(root, folder=root / "other")), 4)
    refused(
        wanted(root, folder=mine, checkpoint=other.checkpoints / "epoch=3.ckpt"), "run.folder", "holds an earlier run"
    )


def test_a_folder_in_which_a_process_is_writing(root: Path) -> None:
    """The refusal does not advise a resumption that would be refused next."""
    mine = root / "mine"
    with ExitStack() as claims:
        run = made(settle(wanted(root, folder=mine), claims), 4)
        checkpoint = run.checkpoints / "epoch=3.ckpt"
        other = {"folder": mine, "checkpoint": checkpoint, "settings": {"model.lr": "0.7"}}
        for command in (wanted(root, folder=mine), wanted(root, **other)):
            with pytest.raises(
                SettingError, match=r"which process \d+ on .* is writing to; wait until it ends"
            ) as found:
                settled(command)
            assert "run.resume" not in str(found.value)
    refused(wanted(root, folder=mine), "holds an earlier run", "--run.resume true")


def test_ranks_but_the_first_claim_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take rank 0's folder once they have joined."""
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_only.rank", 1)
    assert settled(wanted(root)).folder == root / "countdown" / "popo-seed3"
    assert not root.exists()


# -- resuming ------------------------------------------------------------------------------------------------------


def test_resuming_takes_the_newest_checkpoint(root: Path) -> None:
    run = made(settled(wanted(root)), 2, 4)
    again = settled(wanted(root, resume=True, settings={"model.lr": "0.2"}))
    assert again.folder == run.folder and again.checkpoint == run.checkpoints / "epoch=3.ckpt"
    assert again.behind is not None and again.behind.iterations == 4 and again.behind.evaluated == {0}
    assert again.record.id == run.record.id and again.record.settings["model.lr"] == "0.2"
    named = settled(wanted(root, resume=True, checkpoint=run.checkpoints / "epoch=1.ckpt"))
    assert named.folder == run.folder and named.checkpoint == run.checkpoints / "epoch=1.ckpt"


def test_checkpoints_elsewhere_are_found(root: Path, tmp_path: Path) -> None:
    elsewhere, third = tmp_path / "elsewhere", tmp_path / "third"
    run = made(settled(wanted(root, checkpoints=elsewhere)), 2, 4)
    assert run.checkpoints == elsewhere
    again = settled(wanted(root, resume=True))
    assert again.checkpoint == elsewhere / "epoch=3.ckpt"
    assert again.checkpoints == run.folder / "checkpoints"  # as the present command says
    again.record.write(run.folder)
    assert settled(wanted(root, resume=True)).checkpoint == elsewhere / "epoch=3.ckpt"
    moved = settled(wanted(root, resume=True, checkpoints=third))
    moved.record.write(run.folder)
    checkpoint_of(moved, 6)
    assert settled(wanted(root, resume=True)).checkpoint == third / "epoch=5.ckpt"
    run.folder.rename(root / "moved")
    assert settled(wanted(root, resume=True, folder=root / "moved")).checkpoint == third / "epoch=5.ckpt"
    # The folder is lost, but its checkpoints are not.
    lost = settled(wanted(root, resume=True, checkpoints=third))
    assert lost.checkpoint == third / "epoch=5.ckpt" and lost.record.id == run.record.id


def test_a_folder_of_checkpoints_belongs_to_one_run(root: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    run = made(settled(wanted(root, checkpoints=shared)), 2)
    refused(wanted(root, checkpoints=shared), "checkpoint.dirpath is", "another run's checkpoints")
    refused(wanted(root, seed=4, resume=True, checkpoints=shared), "holds another run (seed 3 there, 4 here)")
    refused(wanted(root, "grpo", checkpoint=shared / "epoch=1.ckpt", checkpoints=shared), "another run's checkpoints")
    with ExitStack() as claims:
        settle(wanted(root, checkpoints=tmp_path / "new"), claims)
        with pytest.raises(SettingError, match=r"checkpoint\.dirpath is .* is writing to"):
            settle(wanted(root, seed=4, checkpoints=tmp_path / "new"), claims)
    other = replace(run, record=new_record("countdown", "popo", 3, SETTINGS, 2))
    checkpoint_of(other, 8, folder=shared)  # as an earlier version allowed
    refused(wanted(root, resume=True), "was written by another run", "ckpt_path")


def test_without_any_checkpoint_a_run_begins_anew_only_before_its_first(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = settled(wanted(root, resume=True))
    assert fresh.checkpoint is None and not caplog.text  # or start
    run = made(fresh, 1)
    (run.checkpoints / "epoch=0.ckpt").unlink()
    anew = settled(wanted(root, resume=True))
    assert anew.checkpoint is None and anew.behind is None and anew.record.id == run.record.id
    assert "begins anew" in caplog.text and "metrics.csv.before-resume" in caplog.text
    made(run, 3)
    (run.checkpoints / "epoch=2.ckpt").unlink()
    refused(wanted(root, resume=True), "has made 3 iterations, has no checkpoint", "checkpoints'", "ckpt_path")
    refused(wanted(root, resume=True, folder=run.folder, every=50), "has no checkpoint")  # by its settings at that time
    made(replace(run, record=replace(run.record, checkpoint_every=None)))
    assert settled(wanted(root, resume=True)).checkpoint is None
    (run.folder / "metrics.csv").write_text("step,train/loss\n1,1.0\n")
    refused(wanted(root, resume=True), "has no checkpoint")


def test_a_finished_run_without_a_checkpoint_is_not_begun_anew(root: Path) -> None:
    run = made(settled(wanted(root)), 1, summary=1)
    (run.checkpoints / "epoch=0.ckpt").unlink()
    refused(wanted(root, resume=True), "has no checkpoint")


def test_when_a_run_must_have_written_a_checkpoint() -> None:
    assert checkpoint_every(1, 20, None, 2) == 20
    assert checkpoint_every(-1, None, 7, 3) == 3
    assert checkpoint_every(1, None, None, 2) == 1
    assert checkpoint_every(0, 20, None, 2) is None
    assert checkpoint_every(1, 0, None, 2) is None
    record = new_record("t", "m", 1, {}, 20)
    assert not record.must_have_checkpoint(20) and record.must_have_checkpoint(21)
    fork = replace(record, origin={"checkpoint": "a.ckpt", "iterations": 45})
    assert not fork.must_have_checkpoint(60) and fork.must_have_checkpoint(61)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"method": "grpo"}, "method popo there, grpo here"), ({"seed": 4}, "seed 3 there, 4 here")],
)
def test_resuming_as_another_run_is_refused(root: Path, change: dict[str, Any], word: str) -> None:
    run = made(settled(wanted(root)), 4)
    own = run.checkpoints / "epoch=3.ckpt"
    refused(wanted(root, **change, resume=True, folder=run.folder), word, f"--ckpt_path {own}")
    refused(wanted(root, **change, resume=True, checkpoint=own), word)
    refused(wanted(root, **change, folder=run.folder, checkpoint=own), "run.folder", word, "--run.folder null")


# -- forks ----------------------------------------------------------------------------------------------------------


def test_the_same_run_goes_on_from_its_checkpoint(root: Path) -> None:
    run = made(settled(wanted(root, folder=root / "mine")), 2, 4)
    for folder in (None, root / "mine"):
        again = settled(wanted(root, folder=folder, checkpoint=run.checkpoints / "epoch=1.ckpt"))
        assert again.folder == run.folder and again.record.id == run.record.id and again.record.origin is None
    old = write_checkpoint(root / "old" / "checkpoints" / "a.ckpt")  # does not name its run
    assert settled(wanted(root, checkpoint=old)).folder == root / "old"
    assert settled(wanted(root, checkpoint=write_checkpoint(root / "a.ckpt"))).folder == root / "countdown/popo-seed3"


@pytest.mark.parametrize(
    ("change", "name", "word"),
    [
        ({"method": "grpo"}, "grpo-seed3", "method popo there, grpo here"),
        ({"seed": 4}, "popo-seed4", "seed 3 there, 4 here"),
        ({"settings": {"model.lr": "0.2"}}, "popo-seed3-2", "model.lr 0.1 there, 0.2 here"),
        ({"settings": {"model.kl": "0.2"}}, "popo-seed3-2", "model.kl not there there, 0.2 here"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_fork_gets_a_folder_of_its_own(
    root: Path, change: dict[str, Any], name: str, word: str, elsewhere: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = made(settled(wanted(root, checkpoints=root.parent / "elsewhere" if elsewhere else None)), 2, 4)
    own = run.checkpoints / "epoch=3.ckpt"
    fork = settled(wanted(root, **change, checkpoint=own))
    assert fork.folder == root / "countdown" / name and fork.checkpoint == own
    assert fork.record.id != run.record.id
    assert fork.record.origin == {"checkpoint": str(own), "iterations": 4}
    assert word in fork.news[0] and "begins from" in fork.news[0] and not caplog.text
    if word.startswith("model"):
        refused(wanted(root, **change, checkpoint=own, folder=run.folder), word, "--run.resume true")


def test_a_fork_is_resumed_by_the_command_that_began_it(root: Path) -> None:
    """A queue may start it again: the first time from the other run's checkpoint, then from its own."""
    run = made(settled(wanted(root)), 2, 4)
    command = wanted(root, "grpo", folder=root / "fork", resume=True, checkpoint=run.checkpoints / "epoch=3.ckpt")
    fork = settled(command)
    assert fork.checkpoint == run.checkpoints / "epoch=3.ckpt" and fork.folder == root / "fork"
    made(fork)
    (fork.folder / "metrics.csv").write_text("step,train/loss\n5,1.0\n")
    again = settled(command)  # before its first checkpoint
    assert again.checkpoint == fork.checkpoint and again.record.origin == fork.record.origin
    checkpoint_of(fork, 6)
    assert settled(command).checkpoint == fork.checkpoints / "epoch=5.ckpt"
    assert settled(wanted(root, "grpo", folder=root / "fork", resume=True)).record.origin == fork.record.origin
    other = made(settled(wanted(root, "grpo")), 2)
    refused(replace(command, folder=other.folder), "holds a run that did not begin from it")


# -- how much is left -----------------------------------------------------------------------------------------------


def test_a_finished_run_says_so(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = made(settled(wanted(root)), 10)
    assert settled(wanted(root, resume=True)).checkpoint is not None
    assert "has made all its 10 iterations; what is left is the last evaluation and summary.json" in caplog.text
    made(run, 10, summary=10)
    own = run.checkpoints / "epoch=9.ckpt"
    for command in (wanted(root, resume=True), wanted(root, checkpoint=own)):
        with pytest.raises(RunFinished, match=r"is finished \(10 iterations, trainer.max_epochs 10\); raise"):
            settled(command)
    assert settled(wanted(root, resume=True, max_epochs=11)).checkpoint == own
    assert settled(wanted(root, resume=True, max_epochs=-1)).checkpoint == own
    for other in ("{", '{"iterations": 4}'):  # damaged, or of a shorter run that was continued
        (run.folder / "summary.json").write_text(other)
        assert settled(wanted(root, resume=True)).checkpoint == own
    made(run, 10, summary=10)
    own.unlink()
    with pytest.raises(RunFinished):
        settled(wanted(root, resume=True))
    made(settled(wanted(root)), 2)
    with pytest.raises(RunFinished, match=r"'.*popo-seed3-2' holds a later run, which --run\.folder .*-2 --run"):
        settled(wanted(root, resume=True))


def test_settings_in_sentences_can_be_pasted(root: Path) -> None:
    """Of a folder with a space in its name."""
    root = root / "my runs"
    run = made(settled(wanted(root)), 4)
    refused(
        wanted(root, "grpo", folder=run.folder, resume=True), f"--ckpt_path '{run.checkpoints / 'epoch=3.ckpt'}', w"
    )
    made(run, 10, summary=10)
    made(settled(wanted(root)), 2)
    with pytest.raises(RunFinished, match=rf"which --run\.folder '{root}.*-2' --run\.resume true continues"):
        settled(wanted(root, resume=True))


def test_fewer_iterations_than_are_done(root: Path) -> None:
    run = made(settled(wanted(root)), 4, summary=4)
    own = run.checkpoints / "epoch=3.ckpt"
    refused(wanted(root, resume=True, max_epochs=3), "trainer.max_epochs is 3", "comes after 4 iterations", "raise it")
    refused(wanted(root, "grpo", checkpoint=own, max_epochs=4), "trainer.max_epochs is 4", "nothing is left to train")
    inside = write_checkpoint(run.checkpoints / "inside.ckpt", 5, Monitor={"steps": [{}]})
    assert settled(wanted(root, checkpoint=inside, max_epochs=5)).checkpoint == inside
    refused(wanted(root, checkpoint=inside, max_epochs=4), "trainer.max_epochs is 4", "comes after 5 iterations")


# -- validate, test, predict ----------------------------------------------------------------------------------------


def evaluated(root: Path, checkpoint: str | None = None, **changes: Any) -> tuple[Path, Path | None]:
    return settle_evaluation(RunSettings("countdown", "popo", str(root), **changes), 3, checkpoint)


def test_a_runs_config_means_its_newest_checkpoint(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = made(settled(wanted(root)), 2, 4)
    folder, newest = str(run.folder), run.checkpoints / "epoch=3.ckpt"
    assert evaluated(root, folder=folder) == (run.folder, newest)
    assert "evaluates" in caplog.text and "epoch=3.ckpt" in caplog.text
    assert evaluated(root, resume=True) == (run.folder, newest)
    named = str(run.checkpoints / "epoch=1.ckpt")
    assert evaluated(root, folder=folder, checkpoint=named) == (run.folder, Path(named))
    assert evaluated(root, checkpoint=named) == (run.folder, Path(named))
    assert evaluated(root) == (root / "countdown", None)  # the model itself
    assert evaluated(root, folder=str(root / "new")) == (root / "new", None)


def test_a_forks_config_means_the_forks_newest_checkpoint(root: Path) -> None:
    """Its config.yaml names the checkpoint from which it began."""
    run = made(settled(wanted(root)), 2)
    began = run.checkpoints / "epoch=1.ckpt"
    fork = made(settled(wanted(root, "grpo", checkpoint=began)), 4)
    assert evaluated(root, folder=str(fork.folder), checkpoint=str(began))[1] == fork.checkpoints / "epoch=3.ckpt"


@pytest.mark.parametrize("begins", ["moved", "copied", "seen from another folder"])
def test_the_config_of_a_run_elsewhere_means_that_run(
    begins: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.yaml still names the folder in which it was made, where another run or none may be."""
    monkeypatch.chdir(tmp_path)
    run = made(settled(wanted(Path("runs"))), 2)
    named = str(run.folder)
    (run.folder / "config.yaml").write_text(f"run: {{folder: '{named}'}}\n")
    here = tmp_path / "here"
    if begins == "seen from another folder":
        here = run.folder.absolute()
        monkeypatch.chdir("/")
    else:
        shutil.copytree(run.folder, here)
        if begins == "moved":
            shutil.rmtree(run.folder)
    assert folder_of_run(named, [here / "config.yaml"]) == str(here)
    assert evaluated(root, folder=str(here)) == (here, here / "checkpoints" / "epoch=1.ckpt")
    assert folder_of_run("asked", [here / "config.yaml"]) == "asked", "by an option"
    assert folder_of_run(None, [here / "config.yaml"]) is None
    (here / "run.json").unlink()
    assert folder_of_run(named, [here / "config.yaml"]) == named, "it may be any file of that name"


def test_evaluations_that_have_nothing_to_evaluate(root: Path, tmp_path: Path) -> None:
    run = made(settled(wanted(root)))
    for changes in ({"folder": str(run.folder)}, {"resume": True}, {"resume": True, "folder": str(root / "none")}):
        with pytest.raises(SettingError, match=r"run\.folder is .* has no checkpoint .* ckpt_path"):
            evaluated(root, **changes)
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"run\.folder is .*file/run', where nothing can be written"):
        evaluated(root, folder=str(tmp_path / "file" / "run"))


# -- records --------------------------------------------------------------------------------------------------------


def test_settings_that_decide_what_is_trained() -> None:
    config = {
        "seed_everything": 1,
        "model": {"lr": 0.1, "critic": None, "kinds": [1, {"a": 2}], "none": {}},
        "data": {"async_level": 0},
        "trainer": {"max_epochs": 3},
        "evaluation": {"samples": 2},
        "run": {"folder": "a"},
    }
    assert decisive_settings(config) == {
        "model.lr": "0.1",
        "model.critic": "null",
        "model.kinds": '[1, {"a": 2}]',
        "model.none": "{}",
        "data.async_level": "0",
        "seed_everything": "1",
    }


def test_a_record_of_a_later_version_is_read(tmp_path: Path) -> None:
    record = new_record("t", "m", 1, {}, 20)
    (tmp_path / "run.json").write_text(json.dumps(record.to_plain() | {"later": 1}))
    assert read_record(tmp_path) == record and isinstance(record, RunRecord)
