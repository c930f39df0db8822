"""A disk that is full and a folder that is gone end a run in one sentence."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers.tiny_models import popo

from popo_lightning.core.errors import disk_refusal
from popo_lightning.evaluation import callback


class RemovesTheFolder(L.Callback):
    """Removes the run's folder in the second iteration."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            shutil.rmtree(trainer.default_root_dir)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def ended(capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        popo(*command)
    assert stopped.value.code == 1
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("popo: ")][-1]


def test_a_full_disk(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callback, "write_rows", full)
    said = ended(capsys, "fit", "--config", config, "--config", "method/popo", "--run.folder", tmp_path / "run")
    assert (
        "no room, at test_lost_disks.py:" in said
        and "(No space left on device); make room" in said
        and "--run.resume true" in said
    )


def test_a_removed_folder(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command: list[str | Path] = ["fit", "--config", config, "--config", "method/popo", "--run.folder", tmp_path / "run"]
    command += ["--trainer.callbacks+", f"{__name__}.RemovesTheFolder", "--evaluation.at_start", "false"]
    assert f"the run's folder '{tmp_path / 'run'}' is gone" in ended(capsys, *command)


def test_other_errors_are_not_told_so(tmp_path: Path) -> None:
    assert disk_refusal(PermissionError(errno.EACCES, "Permission denied", str(tmp_path))) is None
    assert disk_refusal(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "file"))) is None
    assert disk_refusal(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "folder" / "file"))) is None
