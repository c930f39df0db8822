"""Where a run writes, and which rows of metrics.csv a resumed run keeps."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from popo_lightning.errors import SettingError
from popo_lightning.run_folder import choose_folder, iterations_done, loggers, newest_checkpoint


def chosen(root: Path, folder: str | None = None, checkpoint: str | None = None) -> Path:
    return choose_folder(folder, str(root), "countdown", "popo", 3, checkpoint)


def test_every_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "countdown"
    assert chosen(tmp_path) == base / "popo-seed3"
    (base / "popo-seed3").mkdir(parents=True)
    assert chosen(tmp_path) == base / "popo-seed3"  # empty, so no run's
    (base / "popo-seed3" / "metrics.csv").touch()
    assert chosen(tmp_path) == base / "popo-seed3-2"
    (base / "popo-seed3-2" / "checkpoints").mkdir(parents=True)
    assert chosen(tmp_path) == base / "popo-seed3-3"


def test_folder_asked_for_must_be_free_unless_resumed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    assert chosen(tmp_path, str(mine)) == mine
    (mine / "checkpoints").mkdir(parents=True)
    with pytest.raises(SettingError, match=r"run\.folder is '.*mine', which holds an earlier run"):
        chosen(tmp_path, str(mine))
    checkpoint = str(mine / "checkpoints" / "a.ckpt")
    assert chosen(tmp_path, str(mine), checkpoint) == mine
    assert chosen(tmp_path, str(tmp_path / "other"), checkpoint) == tmp_path / "other"
    assert chosen(tmp_path, None, checkpoint) == mine
    assert chosen(tmp_path, None, str(tmp_path / "a.ckpt")) == tmp_path / "countdown" / "popo-seed3"


def test_newest_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    for place, name in enumerate(("epoch=9-step=9.ckpt", "epoch=10-step=10.ckpt", "last.txt")):
        torch.save({"pytorch-lightning_version": "2"}, tmp_path / "checkpoints" / name)
        os.utime(tmp_path / "checkpoints" / name, (100 + place, 100 + place))
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "epoch=10-step=10.ckpt"


def test_iterations_behind_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    state = {"pytorch-lightning_version": "2", "RolloutDataModule": {"iteration": 4}, "callbacks": {}}
    torch.save(state, path)
    assert iterations_done(path) == 4
    torch.save(state | {"callbacks": {"Monitor": {"steps": [{"seconds": 1.0}]}}}, path)
    assert iterations_done(path) == 3  # the fourth has no row yet
    torch.save(state | {"callbacks": {"Monitor": {"steps": []}}}, path)
    assert iterations_done(path) == 4
    for damage in (b"", b"no checkpoint", path.read_bytes()[:-100]):
        (tmp_path / "damaged.ckpt").write_bytes(damage)
        with pytest.raises(SettingError, match="not a checkpoint that popo fit wrote"):
            iterations_done(tmp_path / "damaged.ckpt")
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(SettingError, match="not a checkpoint that popo fit wrote"):
        iterations_done(path)
    with pytest.raises(SettingError, match="does not exist"):
        iterations_done(tmp_path / "missing.ckpt")


# Numbers whose decimals say whether they were rounded on the way.
ROWS: list[tuple[int, dict[str, float]]] = [
    (0, {"eval/x/greedy": 1 / 3}),
    (1, {"train/loss": 0.1 + 0.2, "reward/score": 1e-12}),
    (2, {"train/loss": -math.pi * 1e15, "reward/score": 2 / 3}),
    (2, {"eval/x/greedy": 5e-324}),
    (3, {"train/loss": 3.0, "policy/entropy": 0.7}),
    (4, {"train/loss": 4.0}),
]


def write(folder: Path, resumed_at: int | None, rows: list[tuple[int, dict[str, float]]]) -> None:
    table, board = loggers(folder, resumed_at)
    for step, values in rows:
        table.log_metrics(dict(values), step=step)
        board.log_metrics(values, step=step)
    table.finalize("success")
    board.finalize("success")


def read(path: Path) -> list[tuple[int, dict[str, float]]]:
    with path.open(newline="") as file:
        return [
            (int(row["step"]), {name: float(v) for name, v in row.items() if v and name != "step"})
            for row in csv.DictReader(file)
        ]


def test_resumed_run_keeps_earlier_rows_and_drops_later_ones(tmp_path: Path) -> None:
    write(tmp_path, None, ROWS)
    assert read(tmp_path / "metrics.csv") == ROWS
    whole = (tmp_path / "metrics.csv").read_bytes()
    assert list(tmp_path.glob("events.out.tfevents.*"))  # both in the folder itself
    write(tmp_path, 2, [(3, {"train/loss": 33.0})])
    assert read(tmp_path / "metrics.csv") == [*ROWS[:4], (3, {"train/loss": 33.0})]
    assert (tmp_path / "metrics.csv.before-resume").read_bytes() == whole


def test_resumed_run_keeps_earlier_tensorboard_points(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, None, ROWS)
    for file in tmp_path.glob("events.out.tfevents.*"):  # event files are read in the order of their names
        file.rename(tmp_path / "events.out.tfevents.0000000001.earlier")
    write(tmp_path, 2, [(3, {"train/loss": 33.0})])
    events = EventAccumulator(str(tmp_path)).Reload()
    points = {point.step: point.value for point in events.Scalars("train/loss")}
    assert sorted(points) == [1, 2, 3] and points[3] == 33.0


def test_kept_rows_are_on_the_disk_before_the_first_new_one(tmp_path: Path) -> None:
    write(tmp_path, None, ROWS)
    loggers(tmp_path, 2)
    assert read(tmp_path / "metrics.csv") == ROWS[:4]


def test_resuming_at_the_start_or_without_a_table(tmp_path: Path) -> None:
    write(tmp_path, None, ROWS[:3])
    write(tmp_path, 0, ROWS[1:2])
    assert read(tmp_path / "metrics.csv") == ROWS[:2]
    write(tmp_path / "new", 5, [(6, {"train/loss": 6.0})])
    assert read(tmp_path / "new" / "metrics.csv") == [(6, {"train/loss": 6.0})]
    assert not (tmp_path / "new" / "metrics.csv.before-resume").exists()
    assert isinstance(loggers(tmp_path / "new", 6)[0], CSVLogger)
