"""Which checkpoints a resumed run leaves on the disk: those that it would have left without a stop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.tiny_models import fit, method, popo

from popo_lightning.callbacks.checkpoints import Checkpoints
from popo_lightning.callbacks.own_checkpoints import moved

Args = list[str | Path]
QUALITY = {2: 5.0, 4: 7.0}  # of the policy after these iterations; after all others it is 1 / iteration


def left(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".ckpt") for path in (folder / "checkpoints").iterdir())


def named(*iterations: int) -> list[str]:
    return [f"iteration-{n:04d}" for n in iterations]


@pytest.fixture(scope="module")
def command(config: Path) -> Args:
    without = ["--evaluation.every_n_iterations", "0", "--evaluation.at_start", "false", "--evaluation.samples", "0"]
    return ["fit", "--config", config, *method("popo"), *without]


@pytest.fixture(scope="module")
def first(command: Args, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    popo(*command, "--run.folder", folder, "--trainer.max_epochs", "1")
    assert left(folder) == named(1)
    return folder


def resumed(command: Args, folder: Path, iterations: int, *more: str | Path) -> list[str]:
    popo(*command, "--run.folder", folder, "--run.resume", "true", "--trainer.max_epochs", str(iterations), *more)
    return left(folder)


def test_every_resume_leaves_one(command: Args, first: Path, tmp_path: Path) -> None:
    """Of a run in its place, of one that was moved, and of one that now saves at other times."""
    folder = Path(shutil.copytree(first, tmp_path / "copy"))
    assert resumed(command, folder, 2) == named(2)
    assert resumed(command, folder, 3) == named(3)
    assert resumed(command, folder, 4, "--checkpoint.every_n_epochs", "2") == named(4)
    assert left(first) == named(1)


def test_all_are_kept_if_that_is_asked_for(command: Args, first: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(first, tmp_path / "copy"))
    assert resumed(command, folder, 2, "--checkpoint.save_top_k", "-1") == named(1, 2)


def test_another_runs_checkpoint_stays(command: Args, first: Path, tmp_path: Path) -> None:
    """Named once, and again by the command that resumes the fork."""
    origin = ("--ckpt_path", first / "checkpoints" / "iteration-0001.ckpt")
    fork = tmp_path / "fork"
    assert resumed(command, fork, 2, *origin) == named(2)
    assert resumed(command, fork, 3, *origin) == named(3)
    assert left(first) == named(1)


def test_another_runs_checkpoint_below_the_folder_stays(command: Args, first: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(first / "checkpoints", tmp_path / "all" / "first")) / "iteration-0001.ckpt"
    fork: Path = tmp_path / "fork"
    more: Args = ["--ckpt_path", origin, "--checkpoint.dirpath", tmp_path / "all"]
    popo(*command, "--run.folder", fork, "--run.resume", "true", "--trainer.max_epochs", "2", *more)
    popo(*command, "--run.folder", fork, "--run.resume", "true", "--trainer.max_epochs", "3", *more)
    assert origin.exists()


def test_another_runs_checkpoint_in_the_folder_itself_stays(command: Args, first: Path, tmp_path: Path) -> None:
    fork: Path = tmp_path / "fork"
    origin = Path(shutil.copytree(first / "checkpoints", fork / "own")) / "iteration-0001.ckpt"
    more: Args = ["--ckpt_path", origin, "--checkpoint.dirpath", fork / "own"]
    popo(*command, "--run.folder", fork, "--run.resume", "true", "--trainer.max_epochs", "2", *more)
    assert sorted(path.stem for path in (fork / "own").iterdir()) == named(1, 2)


def test_a_checkpoint_of_weights_replaces_none_that_resumes(command: Args, first: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(first, tmp_path / "copy"))
    assert resumed(command, folder, 2, "--checkpoint.save_weights_only", "true") == named(1, 2)


# -- without the command line ------------------------------------------------------------------------------------


class Measures(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        iteration = trainer.current_epoch + 1
        trainer.callback_metrics["quality"] = torch.tensor(QUALITY.get(iteration, 1.0 / iteration))


def trained(
    policy: Path, folder: Path, iterations: int, monkeypatch: pytest.MonkeyPatch, resume: Path | None, **kept: Any
) -> list[str]:
    """Trains to an iteration, from a checkpoint if one is given, and returns what is left."""
    real = L.Trainer.fit
    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "fit", lambda self, *args: real(self, *args, ckpt_path=resume))
        callback = Checkpoints(folder / "checkpoints", every_n_epochs=1, save_on_train_epoch_end=True, **kept)
        fit(policy, folder, callbacks=[callback, Measures()], iterations=iterations)
    return left(folder)


def test_the_best_stays_until_there_is_a_better_one(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed from the best and newest, from the newest beside the best, and from the best after it has moved."""
    best = {"monitor": "quality", "mode": "max"}
    folder, newest = tmp_path, None
    whole = {2: (2,), 3: (2, 3), 4: (4,), 5: (4, 5), 6: (4, 6)}
    for iterations, expected in whole.items():
        if iterations == 5:
            folder = Path(shutil.move(tmp_path, f"{tmp_path}-moved"))
        resume = newest and folder / "checkpoints" / newest
        assert trained(policy, folder, iterations, monkeypatch, resume, **best) == named(*expected)
        newest = f"iteration-{iterations:04d}.ckpt"


def test_the_best_of_an_abandoned_branch_stays(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed from before it, the run saves its newest after as many iterations."""
    best = {"monitor": "quality", "mode": "max", "save_top_k": 2}
    assert trained(policy, tmp_path, 4, monkeypatch, None, **best) == named(2, 4)
    abandoned = tmp_path / "checkpoints" / "iteration-0004.ckpt"
    before = abandoned.read_bytes()
    monkeypatch.setitem(QUALITY, 3, 6.0)
    monkeypatch.setitem(QUALITY, 4, 0.1)
    found = trained(policy, tmp_path, 4, monkeypatch, tmp_path / "checkpoints" / "iteration-0002.ckpt", **best)
    assert found == [*named(2, 3, 4), "iteration-0004-v1"] and abandoned.read_bytes() == before


def test_the_newest_does_not_take_the_name_of_the_best(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"monitor": "quality", "mode": "max", "filename": "policy"}
    assert trained(policy, tmp_path, 4, monkeypatch, None, **best) == ["policy"]
    assert trained(policy, tmp_path / "longer", 3, monkeypatch, None, **best) == ["policy", "policy-v1"]
    kept = torch.load(tmp_path / "longer" / "checkpoints" / "policy.ckpt", weights_only=True)
    assert kept["RolloutDataModule"]["iteration"] == 2


def test_a_file_in_another_folder_stays(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(policy, tmp_path / "one", 1, monkeypatch, None) == named(1)
    origin = tmp_path / "one" / "checkpoints" / "iteration-0001.ckpt"
    assert trained(policy, tmp_path / "two", 2, monkeypatch, origin) == named(2)
    assert left(tmp_path / "one") == named(1)


def test_a_last_one_is_replaced(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(policy, tmp_path, 1, monkeypatch, None, save_last=True) == [*named(1), "last"]
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert trained(policy, tmp_path, 2, monkeypatch, last, save_last=True) == [*named(2), "last"]


def test_a_moved_state_names_the_files_that_are_there(tmp_path: Path) -> None:
    old, new = "/old/checkpoints", str(tmp_path)
    score = torch.tensor(2.0)
    state = {
        "dirpath": old,
        "best_model_path": f"{old}/a.ckpt",
        "kth_best_model_path": f"{old}/a.ckpt",
        "last_model_path": "/elsewhere/b.ckpt",
        "best_k_models": {f"{old}/a.ckpt": score},
    }
    assert moved(state, new) == state, "a best one that was left behind is not taken for one that is here"
    (tmp_path / "a.ckpt").touch()
    assert moved(state, new) == {
        "dirpath": new,
        "best_model_path": f"{new}/a.ckpt",
        "kth_best_model_path": f"{new}/a.ckpt",
        "last_model_path": "/elsewhere/b.ckpt",
        "best_k_models": {f"{new}/a.ckpt": score},
    }
