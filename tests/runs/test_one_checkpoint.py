"""Ranks that would begin from different checkpoints are all refused, before any of them restores one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers.processes import on_two_ranks, trainer_of

from popo_lightning.callbacks import one_checkpoint
from popo_lightning.callbacks.one_checkpoint import OneCheckpoint
from popo_lightning.core.errors import SettingError
from popo_lightning.runs.checkpoint_files import note_time
from runs.test_run_folder import write_checkpoint


def noted(path: Path) -> Path:
    write_checkpoint(path)
    with path.open("rb+", buffering=0) as file:
        note_time(file)
    return path


def refusals(monkeypatch: pytest.MonkeyPatch, *ranks: OneCheckpoint) -> list[str]:
    """Returns what each rank raises, or nothing, if these are the ranks."""
    trainer: Any = None
    everyones: list[Any] = []
    monkeypatch.setattr(one_checkpoint, "all_gather_object", lambda own: everyones.append(own) or [own])
    for each in ranks:
        each.setup(trainer, None, "fit")
    monkeypatch.setattr(one_checkpoint, "all_gather_object", lambda own: everyones)
    found = []
    for each in ranks:
        try:
            each.setup(trainer, None, "fit")
            found.append("")
        except SettingError as error:
            found.append(str(error))
    return found


def test_all_ranks_refuse_different_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = noted(tmp_path / "iteration-0001.ckpt"), noted(tmp_path / "iteration-0002.ckpt")
    said = refusals(monkeypatch, OneCheckpoint(second), OneCheckpoint(first), OneCheckpoint(second))
    assert len(set(said)) == 1 and said[0]
    assert f"'{second}'" in said[0] and "ranks 0, 2" in said[0] and f"'{first}'" in said[0] and "rank 1" in said[0]
    assert "ckpt_path" in said[0] and "run.folder" in said[0]


def test_a_rank_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = noted(tmp_path / "iteration-0001.ckpt")
    said = refusals(monkeypatch, OneCheckpoint(only), OneCheckpoint(None))
    assert said[0] == said[1] and "none (rank 1)" in said[0]


def test_ranks_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on another node's disk is the same checkpoint, wherever it lies and whenever it was copied."""
    one = noted(tmp_path / "a" / "iteration-0001.ckpt")
    copy = tmp_path / "b" / one.name
    copy.parent.mkdir()
    copy.write_bytes(one.read_bytes())
    os.utime(copy, (1, 1))
    assert refusals(monkeypatch, OneCheckpoint(one), OneCheckpoint(str(copy))) == ["", ""]
    assert refusals(monkeypatch, OneCheckpoint(None), OneCheckpoint(None)) == ["", ""]
    assert refusals(monkeypatch, OneCheckpoint(one)) == [""]


def test_of_the_same_name_but_written_at_another_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (noted(tmp_path / folder / "iteration-0001.ckpt") for folder in "ab")
    assert all(refusals(monkeypatch, OneCheckpoint(one), OneCheckpoint(other)))


def test_a_new_run_on_one_rank_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count its evaluations anew, so the ranks would evaluate after different iterations."""
    one = noted(tmp_path / "iteration-0001.ckpt")
    said = refusals(monkeypatch, OneCheckpoint(one, forks=True), OneCheckpoint(one))
    assert said[0] == said[1] and "a new run from" in said[0]


class Restores(L.Callback):
    restored = False

    def on_load_checkpoint(self, *_: Any) -> None:
        self.restored = True


class Nothing(L.LightningModule):
    def training_step(self, *_: Any) -> None:
        """Is never reached."""

    def configure_optimizers(self) -> None:
        """Has no parameters."""


def resumed(checkpoints: list[str | None]) -> tuple[str, bool]:
    """Returns what a trainer's fit raises on this rank, which has a checkpoint of its own, and whether it restored."""
    own, seen = checkpoints[int(os.environ["RANK"])], Restores()
    trainer = trainer_of("ddp", 2, 1, [OneCheckpoint(own), seen])
    try:
        trainer.fit(Nothing(), torch.utils.data.DataLoader([0]), ckpt_path=own, weights_only=True)
    except SettingError as error:
        return str(error), seen.restored
    finally:
        dist.destroy_process_group()
    return "", seen.restored


def test_joined_ranks_refuse_together(tmp_path: Path) -> None:
    one, other = str(noted(tmp_path / "1.ckpt")), str(noted(tmp_path / "2.ckpt"))
    for given in ([one, None], [one, other]):
        (first, restored), second = on_two_ranks(resumed, tmp_path / "said", given, seconds=60)
        assert second == (first, False) and not restored
        assert "do not begin from the same checkpoint" in first and f"'{one}'" in first
