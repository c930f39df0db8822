"""What a run's folder contains: whose run it is, and which checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from popo_lightning.core.errors import SettingError
from popo_lightning.runs.folder import (
    GLOBAL_RANKS,
    behind,
    checkpoint_folders,
    holds_run,
    home_of,
    is_first_rank,
    newest_of,
    note_nodes,
)
from popo_lightning.runs.record import RECORD, new_record, read_record


def write_checkpoint(path: Path, iteration: int = 4, **callbacks: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"pytorch-lightning_version": "2", "RolloutDataModule": {"iteration": iteration}, "callbacks": callbacks}
    torch.save(state, path)
    return path


def test_a_folder_whose_writing_was_interrupted_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("whole", "begun"):
        (tmp_path / f"{name}.ckpt").mkdir(parents=True)
        (tmp_path / f"{name}.ckpt" / "__0_0.distcp").touch()
    (tmp_path / "whole.ckpt" / ".metadata").touch()
    write_checkpoint(tmp_path / "whole.ckpt" / "meta.pt")
    os.utime(tmp_path / "whole.ckpt", (1, 1))
    assert newest_of([tmp_path]) == tmp_path / "whole.ckpt"


def test_newest_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    assert newest_of([tmp_path]) is None
    for place, name in enumerate(("a/epoch=9-step=9.ckpt", "a/epoch=10-step=10.ckpt", "b/epoch=3-step=3.ckpt", "b/c")):
        write_checkpoint(tmp_path / name)
        os.utime(tmp_path / name, (100 + place, 100 + place))
    assert newest_of([tmp_path / "a"]) == tmp_path / "a" / "epoch=10-step=10.ckpt"
    assert newest_of([tmp_path / "b", tmp_path / "a", tmp_path / "none"]) == tmp_path / "b" / "epoch=3-step=3.ckpt"


def test_what_a_checkpoint_has_behind_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.ckpt")
    assert (behind(path).iterations, behind(path).begun, behind(path).evaluated) == (4, 4, frozenset())
    history = [{"iteration": 0, "eval/x/greedy": 0.5}, {"iteration": 2}]
    write_checkpoint(path, Monitor={"steps": [{"seconds": 1.0}]}, Evaluation={"history": history})
    found = behind(path)
    assert (found.iterations, found.begun, found.evaluated) == (3, 4, {0, 2})  # the fourth iteration has no row yet
    write_checkpoint(path, Monitor={"steps": []})
    assert behind(path).iterations == 4


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.ckpt")
    for damage in (b"", b"no checkpoint", path.read_bytes()[:-100]):
        (tmp_path / "damaged.ckpt").write_bytes(damage)
        with pytest.raises(SettingError, match="not a checkpoint that popo fit wrote"):
            behind(tmp_path / "damaged.ckpt")
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(SettingError, match="not a checkpoint that popo fit wrote"):
        behind(path)
    torch.save({"pytorch-lightning_version": "2", "RolloutDataModule": {"iteration": 4}}, path)
    with pytest.raises(SettingError, match=r"holds weights alone .*checkpoint\.save_weights_only"):
        behind(path)
    with pytest.raises(SettingError, match="does not exist"):
        behind(tmp_path / "missing.ckpt")
    with pytest.raises(SettingError, match="a folder that is no checkpoint"):
        behind(tmp_path)


def test_what_makes_a_folder_a_runs(tmp_path: Path) -> None:
    assert not holds_run(tmp_path / "none") and not holds_run(tmp_path)
    for name in ("run.lock", "config.yaml", "log.txt", "events.out.tfevents.1"):
        (tmp_path / name).touch()  # files of a failed start
    assert not holds_run(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    record = new_record("t", "m", 1, {}, 20).writing_to(tmp_path, elsewhere)
    record.write(tmp_path)
    assert not holds_run(tmp_path)
    write_checkpoint(elsewhere / "a.ckpt")
    assert holds_run(tmp_path)
    (elsewhere / "a.ckpt").unlink()
    (tmp_path / RECORD).write_text("{")
    assert holds_run(tmp_path), "a damaged record is somebody's"
    (tmp_path / RECORD).unlink()
    for name in ("metrics.csv", "summary.json", "checkpoints"):
        (tmp_path / name).touch()
        assert holds_run(tmp_path)
        (tmp_path / name).unlink()


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    record = new_record("t", "m", 1, {"data.async_level": "0"}, None)
    record = record.writing_to(tmp_path, tmp_path / "checkpoints").writing_to(tmp_path, Path("/elsewhere"))
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    assert record.checkpoints == ("checkpoints", "/elsewhere")
    moved = tmp_path.with_name("moved")
    moved.mkdir()
    record.write(moved)
    assert checkpoint_folders(moved) == [moved / "checkpoints", Path("/elsewhere")]
    for damage in ("", "[]", '{"id": 3}'):
        (tmp_path / RECORD).write_text(damage)
        with pytest.raises(SettingError, match=r"damaged run\.json"):
            read_record(tmp_path)


def test_the_run_that_wrote_a_checkpoint_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    record = new_record("t", "m", 1, {}, 20)
    kept = {"run": record.to_plain(), "folder": str(folder)}
    path = write_checkpoint(tmp_path / "elsewhere" / "a.ckpt", RunKeeper=kept)
    assert home_of(path) is None
    record.write(folder)
    assert home_of(path) == folder
    new_record("t", "m", 1, {}, 20).write(folder)  # now another run has the folder
    assert home_of(path) is None
    copied = write_checkpoint(tmp_path / "b" / "checkpoints" / "a.ckpt", RunKeeper=kept)
    assert home_of(copied) is None, "the file alone was copied"
    for name in (RECORD, "metrics.csv", "summary.json"):
        (tmp_path / "b" / name).touch()  # of a whole folder that was moved
        assert home_of(copied) == tmp_path / "b"
        (tmp_path / "b" / name).unlink()
    record.write(folder)
    assert home_of(copied) == folder
    assert home_of(write_checkpoint(tmp_path / "old.ckpt")) is None


BY_HAND = {"MASTER_ADDR": "node0", "NODE_RANK": "1"}  # the first process of the second node, without a launcher


@pytest.mark.parametrize(
    ("rank", "nodes", "given", "first"),
    [
        (0, 1, {}, True),
        (0, 2, {}, True),
        (0, 2, BY_HAND, False),
        (0, 1, BY_HAND, True),  # a run of its own on that node
        (0, 2, {"GROUP_RANK": "1"}, False),
        (0, 2, {"NODE_RANK": "0", "GROUP_RANK": "1"}, True),  # Lightning reads NODE_RANK first
        (1, 2, {"NODE_RANK": "0"}, False),
        (0, 2, BY_HAND | {"SLURM_PROCID": "0"}, True),  # the launcher's rank is that of all nodes
        (0, 2, BY_HAND | {"RANK": "0"}, True),
    ],
)
def test_the_first_rank_is_on_the_first_node(
    rank: int, nodes: int, given: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    for name in ("NODE_RANK", "GROUP_RANK", *GLOBAL_RANKS):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    note_nodes(nodes)
    assert is_first_rank() == first
