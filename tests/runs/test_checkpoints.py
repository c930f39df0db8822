"""Checkpoints: when they are written, that they are complete or absent, and a run that cannot write them."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from helpers.processes import on_two_ranks, rows_of, trainer_of
from helpers.tiny_models import fit, method, popo
from lightning.pytorch.strategies import ModelParallelStrategy

from popo_lightning.callbacks.checkpoints import Checkpoints
from popo_lightning.core.errors import SettingError
from popo_lightning.policy import PolicyModule
from popo_lightning.runs import checkpoint_files
from popo_lightning.runs.checkpoint_files import (
    WholeFileIO,
    draft_for,
    finish_folder,
    flaw,
    state_in,
    take_away,
    tidy,
    written_at,
)
from popo_lightning.runs.folder import newest_of

ONE = {"pytorch-lightning_version": "2", "weights": torch.arange(1000.0)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def saved(path: Path, content: Any = ONE, seconds: int = 0) -> Path:
    """Writes a complete checkpoint with a time some seconds after the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("popo_lightning.runs.checkpoint_files.time.time_ns", lambda: (1_000_000 + seconds) * 10**9)
        WholeFileIO().save_checkpoint(content, path)
    os.utime(path, (1_000_000 + seconds, 1_000_000 + seconds))
    return path


def sharded(path: Path, seconds: int = 0) -> Path:
    """As FSDP2 writes it, some seconds after the first."""
    with draft_for(path) as draft, pytest.MonkeyPatch.context() as patch:
        patch.setattr("popo_lightning.runs.checkpoint_files.time.time_ns", lambda: (1_000_000 + seconds) * 10**9)
        draft.mkdir(parents=True)
        for name in ("__0_0.distcp", ".metadata"):
            (draft / name).write_bytes(b"x" * 100)
        torch.save(ONE, draft / "meta.pt")
        finish_folder(draft, path)
    return path


# -- files -----------------------------------------------------------------------------------------------------


def test_a_file_is_whole_and_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "new" / "a.ckpt")
    assert names(path.parent) == ["a.ckpt"] and flaw(path) is None
    saved(path, ONE | {"more": 1})
    assert torch.load(path, weights_only=True)["more"] == 1


class FullAfter:
    """A file that takes only a given number of bytes."""

    def __init__(self, path: Path, room: int, code: int = errno.ENOSPC) -> None:
        self.file, self.room, self.code = FileIO(path, "w"), room, code

    def __enter__(self) -> FullAfter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        taken = min(len(data), self.room)
        self.room -= taken
        if taken < len(data) and not taken:
            raise OSError(self.code, os.strerror(self.code))
        return self.file.write(data[:taken])

    def fileno(self) -> int:
        return self.file.fileno()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """While there is a limit, a draft that is opened for writing takes only `room` bytes."""
    disk = SimpleNamespace(room=None, code=errno.ENOSPC)
    real = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if disk.room is not None and "w" in mode and "b" in mode and ".draft" in str(self):
            return FullAfter(self, disk.room, disk.code)
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    yield disk


@pytest.mark.parametrize("room", [0, 1, 700, 3000])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_old_one(tmp_path: Path, full_disk: SimpleNamespace, room: int, code: int) -> None:
    path = saved(tmp_path / "a.ckpt")
    full_disk.room, full_disk.code = room, code
    with pytest.raises(OSError, match=os.strerror(code)):
        WholeFileIO().save_checkpoint(ONE | {"more": 1}, path)
    assert names(tmp_path) == ["a.ckpt"] and "more" not in torch.load(path, weights_only=True)


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    kind = lambda fd: "folder" if Path(f"/proc/self/fd/{fd}").is_dir() else "file"  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(kind(fd)), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (done.append("name"), replace(self, target))[1])
    saved(tmp_path / "a.ckpt")
    assert done == ["file", "name", "folder"]


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Yields a file system of 3 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_small_file_system(tmpfs: Path) -> None:
    """It holds one checkpoint of 2 MB, not two."""
    big = ONE | {"weights": torch.zeros(500_000)}
    path = saved(tmpfs / "a.ckpt", big)
    with pytest.raises(OSError, match="No space left on device"):
        WholeFileIO().save_checkpoint(big, tmpfs / "b.ckpt")
    assert names(tmpfs) == ["a.ckpt"] and newest_of([tmpfs]) == path


def test_no_room_in_the_temporary_folder(tmpfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmpfs))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = saved(tmp_path / "run" / "a.ckpt", ONE | {"weights": torch.zeros(2_000_000)})
    assert flaw(path) is None and names(tmpfs) == []


def test_a_folder_is_whole_and_alone(tmp_path: Path) -> None:
    path = sharded(tmp_path / "a.ckpt")
    assert names(tmp_path) == ["a.ckpt"] and flaw(path) is None
    sharded(path)  # replaces another one
    assert names(tmp_path) == ["a.ckpt"] and flaw(path) is None


@pytest.mark.parametrize("lost", ["meta.pt", ".metadata", "__0_0.distcp"])
def test_a_folder_that_lacks_something(tmp_path: Path, lost: str) -> None:
    path = sharded(tmp_path / "a.ckpt")
    (path / lost).unlink()
    assert lost in str(flaw(path))
    if lost == "__0_0.distcp":
        (path / lost).write_bytes(b"x" * 99)
        assert "lacks bytes of __0_0.distcp" in str(flaw(path))


def test_nothing_is_left_of_one_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (sharded(tmp_path / "a.ckpt"), saved(tmp_path / "b.ckpt")):
        take_away(path)
        take_away(path)
    assert names(tmp_path) == []
    monkeypatch.setattr(checkpoint_files, "remove", lambda path: None)  # the process died meanwhile
    take_away(sharded(tmp_path / "c.ckpt"))
    assert names(tmp_path) == [".c.ckpt.draft"]


# -- the newest whole one --------------------------------------------------------------------------------------


def test_the_newest_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = saved(tmp_path / "good.ckpt")
    saved(tmp_path / "older.ckpt", seconds=-10)
    cut = saved(tmp_path / "cut.ckpt", seconds=10)
    cut.write_bytes(cut.read_bytes()[:-200])
    foreign = saved(tmp_path / "foreign.ckpt", {"weights": 1}, seconds=2)
    unfinished = tmp_path / "unfinished.ckpt"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"x")
    empty = tmp_path / "empty.ckpt"
    empty.touch()
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    (tmp_path / ".next.ckpt.draft").write_bytes(b"half")
    for place, path in enumerate([cut, foreign, unfinished, empty], 1):
        os.utime(path, (1_000_000 + place, 1_000_000 + place))
    assert newest_of([tmp_path]) == good
    said = [line.removeprefix("popo: passed over ") for line in capsys.readouterr().err.splitlines()]
    reasons = {Path(path).name: why for path, _, why in (line.partition(", which ") for line in said)}
    assert list(reasons) == ["last.ckpt", "empty.ckpt", "unfinished.ckpt", "foreign.ckpt", "cut.ckpt"]
    assert "link to nothing" in reasons["last.ckpt"]
    assert reasons["cut.ckpt"] == reasons["empty.ckpt"] == "cannot be read (it is cut short, or no checkpoint)"
    assert "has no .metadata" in reasons["unfinished.ckpt"] and "not one that popo fit" in reasons["foreign.ckpt"]
    assert newest_of([tmp_path / "nowhere"]) is newest_of([unfinished]) is None


def test_copies_are_in_the_order_of_writing(tmp_path: Path) -> None:
    """Of files and of shards; a copy's own time is that of copying."""
    for name in ("third", "first", "second"):  # not the order of the names
        place = ("first", "second", "third").index(name)
        saved(tmp_path / f"{name}.ckpt", seconds=10 * place)
        shards = sharded(tmp_path / "shards" / f"{name}.ckpt", seconds=10 * place)
        for path in (tmp_path / f"{name}.ckpt", shards, shards / "meta.pt"):
            os.utime(path, (2_000_000 - 10 * place, 2_000_000 - 10 * place))
    for folder in (tmp_path, tmp_path / "shards"):
        assert newest_of([folder]) == folder / "third.ckpt"
        assert [path.stem for path in sorted(folder.glob("*.ckpt"), key=written_at)] == ["first", "second", "third"]
    assert newest_of([tmp_path / "shards", tmp_path]) in (tmp_path / "third.ckpt", tmp_path / "shards" / "third.ckpt")
    read = state_in(tmp_path / "third.ckpt")
    assert read is not None and torch.equal(read["weights"], ONE["weights"])
    assert zipfile.ZipFile(tmp_path / "third.ckpt").comment == b"written at ns 00001000020000000000"
    # one that another writer made has the file's time, and equal times the order of the names
    torch.save(ONE, tmp_path / "b.ckpt")
    torch.save(ONE, tmp_path / "a.ckpt")
    for name in "ab":
        os.utime(tmp_path / f"{name}.ckpt", (3_000_000, 3_000_000))
    assert newest_of([tmp_path]) == tmp_path / "b.ckpt"


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    path, shards = saved(tmp_path / "a.ckpt"), sharded(tmp_path / "b.ckpt")
    (tmp_path / ".c.ckpt.draft").write_bytes(b"half")
    (tmp_path / ".d.ckpt.draft").mkdir()
    (tmp_path / ".d.ckpt.draft" / "__0_0.distcp").write_bytes(b"half")
    shutil.copytree(shards, tmp_path / ".b.ckpt.replaced")  # died after the new one had its name
    shards.rename(tmp_path / ".e.ckpt.replaced")  # died before
    tidy(tmp_path)
    assert names(tmp_path) == ["a.ckpt", "b.ckpt", "e.ckpt"]
    assert flaw(path) is None and flaw(tmp_path / "e.ckpt") is None


def test_resuming_says_what_it_passes_over(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--config", config, *method("popo"), "--evaluation.every_n_iterations", "0"]
    command += ["--evaluation.at_start", "false", "--evaluation.samples", "0", "--run.folder", tmp_path]
    popo(*command, "--trainer.max_epochs", "1")
    (first,) = (tmp_path / "checkpoints").iterdir()
    cut = first.with_name("iteration-0010.ckpt")
    cut.write_bytes(first.read_bytes()[:-1000])
    left = first.with_name(".iteration-0011.ckpt.draft")
    left.write_bytes(b"half")
    cli = popo(*command, "--trainer.max_epochs", "2", "--run.resume", "true")
    assert cli.trainer.ckpt_path == str(first) and not left.exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert (
        len(said) == 1
        and str(cut) in said[0]
        and said[0].endswith("which cannot be read (it is cut short, or no checkpoint)")
    )


def test_a_resumed_run_names_what_it_went_on_from(
    config: Path, tmp_path: Path, full_disk: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["fit", "--config", config, *method("popo"), "--evaluation.every_n_iterations", "0"]
    command += ["--evaluation.at_start", "false", "--evaluation.samples", "0", "--run.folder", tmp_path]
    popo(*command, "--trainer.max_epochs", "1")
    (first,) = (tmp_path / "checkpoints").iterdir()
    full_disk.room = 0
    popo(*command, "--trainer.max_epochs", "2", "--run.resume", "true")
    assert f"{first} stays as it is, and the run ends without one of its end" in caplog.text


# -- when ------------------------------------------------------------------------------------------------------


def short_fit(policy: Path, folder: Path, callback: Checkpoints, **settings: Any) -> Any:
    return fit(policy, folder, callbacks=[callback, *settings.pop("callbacks", [])], **settings)


def steps_of(folder: Path) -> list[str]:
    return [name.removesuffix(".ckpt") for name in names(folder / "checkpoints")]


class NoGroups(L.Callback):
    """Empties minibatches from some iteration on, as if no group were effective."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.version >= self.iteration:
            batch.groups = []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_n_epochs": 2}, ["iteration-0003"]),
        ({"every_n_epochs": 2, "save_top_k": -1}, ["iteration-0002", "iteration-0003"]),
        ({"every_n_epochs": 3}, ["iteration-0003"]),
        ({"every_n_train_steps": 4}, ["iteration-0003"]),
        ({"every_n_epochs": 20, "save_last": True}, ["last"]),
        ({"every_n_epochs": 1, "save_last": True}, ["iteration-0003", "last"]),
        ({"every_n_epochs": 2, "save_top_k": 0, "save_last": True}, ["last"]),
        ({"every_n_epochs": 1, "save_top_k": 0}, []),
        ({"every_n_epochs": 20, "save_last": "link"}, ["iteration-0003", "last"]),
    ],
)
def test_the_end_is_saved(policy: Path, tmp_path: Path, settings: dict[str, Any], expected: list[str]) -> None:
    keep = settings.get("save_on_train_epoch_end", True)
    callback = Checkpoints(tmp_path / "checkpoints", save_on_train_epoch_end=keep, **settings)
    short_fit(policy, tmp_path, callback)
    assert steps_of(tmp_path) == expected
    if expected:
        state = torch.load(tmp_path / "checkpoints" / f"{expected[-1]}.ckpt", weights_only=True)
        assert state["RolloutDataModule"]["iteration"] == 3 and not state["RolloutDataModule"]["ranks"][0]["pending"]


def test_the_end_is_saved_before_the_last_evaluation(config: Path, tmp_path: Path) -> None:
    """The last evaluation may take hours, and fail. Here the eighth call of the engine fails."""
    fails = [
        "--data.engine",
        "helpers.tiny_models.SignalWhileSampling",
        "--data.engine.call",
        "8",
        "--data.engine.number",
        "0",
    ]
    with pytest.raises(RuntimeError, match="out of luck"):
        popo("fit", "--config", config, *fails, "--trainer.max_epochs", "3", "--run.folder", tmp_path)
    assert steps_of(tmp_path) == ["iteration-0003"]


def test_a_metric_keeps_the_best_and_the_newest(policy: Path, tmp_path: Path) -> None:
    """This holds at every save: a killed run loses nothing since the last save, and no other checkpoint stays."""

    class Metric(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            iteration = trainer.current_epoch + 1
            trainer.callback_metrics["quality"] = torch.tensor({2: 2.0, 4: 3.0}.get(iteration, 1.0 / iteration))

        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            found.append(steps_of(tmp_path))

    found: list[list[str]] = []
    kept = {"monitor": "quality", "mode": "max", "every_n_epochs": 1, "save_on_train_epoch_end": True}
    callback = Checkpoints(tmp_path / "checkpoints", **kept)
    short_fit(policy, tmp_path, callback, callbacks=[Metric()], iterations=6)
    best_and_newest = [[], [1], [2], [2, 3], [4], [4, 5], [4, 6]]
    assert [*found, steps_of(tmp_path)] == [[f"iteration-{n:04d}" for n in each] for each in best_and_newest]
    state = torch.load(tmp_path / "checkpoints" / "iteration-0006.ckpt", weights_only=True)
    assert state["RolloutDataModule"]["iteration"] == 6


def test_a_name_has_the_iterations_done_and_the_minibatches_of_the_next(policy: Path, tmp_path: Path) -> None:
    every = {"every_n_epochs": 0, "every_n_train_steps": 1, "save_top_k": -1}
    short_fit(policy, tmp_path, Checkpoints(tmp_path / "checkpoints", **every), iterations=2)
    names = ["iteration-0000-minibatch-1", "iteration-0001", "iteration-0001-minibatch-1", "iteration-0002"]
    assert sorted(steps_of(tmp_path)) == names
    own = Checkpoints(tmp_path / "own", filename="{iteration}-{step}")
    short_fit(policy, tmp_path / "another", own, iterations=2)
    assert [path.stem for path in (tmp_path / "own").iterdir()] == ["iteration=2-step=4"]


def test_saved_while_no_step_is_taken(policy: Path, tmp_path: Path) -> None:
    for number, every in enumerate([{"every_n_epochs": 1}, {"every_n_train_steps": 2}]):
        folder = tmp_path / str(number)
        callback = Checkpoints(folder / "checkpoints", save_top_k=-1, save_on_train_epoch_end=True, **every)
        run = short_fit(policy, folder, callback, callbacks=[NoGroups(1)], iterations=4)
        assert run.trainer.global_step == 2
        assert steps_of(folder) == [f"iteration-{iteration:04d}" for iteration in range(1, 5)]


# -- runs that cannot save -------------------------------------------------------------------------------------


def test_a_run_that_cannot_save_continues(
    policy: Path, tmp_path: Path, full_disk: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    class Fills(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            full_disk.room = {0: None, 1: 100_000, 2: 0, 3: None}[trainer.current_epoch]
            found.append(steps_of(tmp_path))

    found: list[list[str]] = []
    callback = Checkpoints(tmp_path / "checkpoints", every_n_epochs=1, save_on_train_epoch_end=True)
    with caplog.at_level(logging.WARNING):
        short_fit(policy, tmp_path, callback, callbacks=[Fills()], iterations=4)
    first = tmp_path / "checkpoints" / "iteration-0001.ckpt"
    assert found == [[], [first.stem], [first.stem], [first.stem]]
    assert steps_of(tmp_path) == ["iteration-0004"]  # it replaced the first
    said = [record.getMessage() for record in caplog.records if "is not written" in record.getMessage()]
    assert len(said) == 2 and all("No space left on device" in line and f"{first} stays" in line for line in said)


def test_a_read_only_folder(policy: Path, tmpfs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Root can write anywhere, but not to a file system that is mounted read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    with caplog.at_level(logging.WARNING):
        run = short_fit(policy, tmp_path, Checkpoints(tmpfs / "checkpoints"), iterations=1)
    assert run.trainer.global_step == 2 and "Read-only file system" in caplog.text and "no earlier one" in caplog.text


def test_weights_that_are_not_finite_are_never_written(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(L.Callback):
        """Breaks a weight or a moment after the step's own check."""

        def __init__(self, moment: bool) -> None:
            self.moment = moment

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                (state, *_) = trainer.optimizers[0].state.values()
                broken = state["exp_avg_sq"] if self.moment else next(pl_module.parameters()).data
                broken.view(-1)[0] = torch.inf

    for moment in (False, True):
        folder = tmp_path / str(moment)
        callback = Checkpoints(folder / "checkpoints", every_n_epochs=1, save_on_train_epoch_end=True)
        with caplog.at_level(logging.WARNING):
            short_fit(policy, folder, callback, callbacks=[Breaks(moment)], iterations=2)
        assert steps_of(folder) == ["iteration-0001"]
        assert "iteration-0002.ckpt is not written: weights or optimizer state hold a number" in caplog.text


def test_no_checkpoint_while_steps_are_skipped(policy: Path, tmp_path: Path) -> None:
    """The weights may be about to break. A checkpoint is written at the end, and the last good one stays."""
    from training.test_finite_steps import Poison

    callback = Checkpoints(tmp_path / "checkpoints", every_n_epochs=1, save_on_train_epoch_end=True)
    short_fit(policy, tmp_path, callback, callbacks=[Poison(3, 5)], iterations=3)
    assert steps_of(tmp_path) == ["iteration-0001", "iteration-0003"]


# -- two ranks -------------------------------------------------------------------------------------------------


def save_on_ranks(policy: str, folder: str) -> list[Any]:
    """Saves in shards and whole. Rank 0's disk takes everything, or is full from the second epoch on."""
    torch.set_num_threads(1)
    real, found = Path.open, []
    for in_shards, room in [(True, None), (True, 100), (False, None), (False, 100)]:
        module = PolicyModule(path=policy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        callback = Checkpoints(f"{folder}/{in_shards}-{room}", every_n_epochs=1, save_on_train_epoch_end=True)
        trainer = trainer_of("fsdp2", 2, 1, [callback], max_epochs=2, enable_checkpointing=True)
        cast(ModelParallelStrategy, trainer.strategy)._save_distributed_checkpoint = in_shards

        def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            full = room is not None and trainer.current_epoch >= 1 and trainer.is_global_zero  # noqa: B023
            if full and "wb" in mode and ".draft" in str(self):
                return FullAfter(self, 100)
            return real(self, mode, *args, **kwargs)

        Path.open = opened  # type: ignore[method-assign,assignment]
        own = [rows_of(trainer.global_rank, [3, 4])]
        trainer.fit(module, torch.utils.data.DataLoader(own, batch_size=None, num_workers=0))
        Path.open = real  # type: ignore[method-assign]
        found.append((trainer.global_step, callback.best_model_path))
    return found


def test_two_ranks_save_or_not_together(policy: Path, tmp_path: Path) -> None:
    """A rank that cannot write does not leave the other waiting, and both record the same."""
    ranks = on_two_ranks(save_on_ranks, tmp_path, str(policy), str(tmp_path / "saved"), seconds=240)
    assert ranks[0] == ranks[1]
    for (steps, best), step in zip(ranks[0], (2, 1, 2, 1), strict=True):
        path = Path(best)
        assert steps == 2 and names(path.parent) == [path.name] == [f"iteration-{step:04d}.ckpt"]
        assert path.is_dir() == ("True" in path.parent.name) and flaw(path) is None


def test_an_error_before_the_set_up_stays_what_it_is() -> None:
    trainer: Any = None
    Checkpoints(save_on_exception=True).on_exception(trainer, None, SettingError("refused"))  # type: ignore[arg-type]


def test_save_on_exception_is_refused_where_one_rank_cannot(policy: Path, tmp_path: Path) -> None:
    class Several(L.Callback):
        """Imitates a run of several ranks."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.datamodule.async_level = 1

    callback = Checkpoints(tmp_path / "checkpoints", save_on_exception=True)
    with pytest.raises(SettingError, match=r"checkpoint\.save_on_exception is true.*data\.async_level 1; leave it out"):
        fit(policy, tmp_path, callbacks=[Several(), callback], iterations=1)
