"""Untrusted and damaged checkpoints: no code in them runs, and every changed bit is noticed."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import as_shards, flipped, newest, refused, said_by
from helpers.tiny_models import method, popo

from popo_lightning.cli.export.saved_policy import SavedPolicy, nested, opened, saved_policy
from popo_lightning.cli.export.weights import tensors_of, weights_of
from popo_lightning.core.errors import SettingError
from popo_lightning.runs.folder import progress


@pytest.fixture(scope="module")
def checkpoint(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read") / "run"
    popo("fit", "--config", config, *method("grpo"), "--run.folder", folder, "--trainer.max_epochs", 1)
    return newest(folder)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"more": Touch(tmp_path / "ran")}, tmp_path / "hostile.ckpt")
    said = refused("export", tmp_path / "hostile.ckpt", tmp_path / "out")
    assert "cannot be read" in said and not (tmp_path / "ran").exists()


def test_shards_that_would_run_code_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    shards = as_shards(checkpoint, tmp_path / "hostile.ckpt")
    contents = pickle.loads((shards / ".metadata").read_bytes())
    contents.planner_data = Touch(tmp_path / "ran")
    (shards / ".metadata").write_bytes(pickle.dumps(contents))
    said = refused("export", shards, tmp_path / "out")
    assert "is damaged" in said and "no list of contents has" in said and not (tmp_path / "ran").exists()
    assert pickle.loads((shards / ".metadata").read_bytes()) and (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch.distributed.checkpoint.filesystem.os"]
)
def test_names_of_other_things_in_a_list_of_contents(checkpoint: Path, tmp_path: Path, name: str) -> None:
    shards = as_shards(checkpoint, tmp_path / "a.ckpt")
    module, _, last = name.rpartition(".")
    text = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, last)]
    (shards / ".metadata").write_bytes(b"\x80\x04" + b"".join(text) + b"\x93.")  # the two, and the object they name
    with pytest.raises(pickle.UnpicklingError, match=last):
        tensors_of(shards, "state_dict.model.")


def test_a_part_elsewhere_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    shards = as_shards(checkpoint, tmp_path / "a.ckpt")
    shutil.copy(next(shards.glob("*.distcp")), tmp_path / "elsewhere.distcp")
    contents = pickle.loads((shards / ".metadata").read_bytes())
    for part in contents.storage_data.values():
        object.__setattr__(part, "relative_path", "../elsewhere.distcp")
    (shards / ".metadata").write_bytes(pickle.dumps(contents))
    assert "in another folder" in refused("export", shards, tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_one_changed_bit_of_a_weight_is_noticed(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    copied = tmp_path / "copy.ckpt"
    if kind == "shards":
        as_shards(checkpoint, copied)
    else:
        shutil.copy(checkpoint, copied)
    weight = weights_of(opened(copied))["model.layers.1.mlp.up_proj.weight"]
    file = copied if kind == "file" else next(copied.glob("*.distcp"))
    flipped(file, weight.numpy().tobytes())
    said = refused("export", copied, tmp_path / "out")
    assert "is damaged" in said and "up_proj" in said and "not those that were written" in said


def test_what_is_cut_off_or_missing(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:-3000])
    assert "cannot be read" in refused("export", tmp_path / "cut.ckpt", tmp_path / "out")
    shards = as_shards(checkpoint, tmp_path / "shards.ckpt")
    part = next(shards.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-3000])
    assert "is damaged" in refused("export", shards, tmp_path / "out")
    part.unlink()
    assert "is damaged" in refused("export", shards, tmp_path / "out")
    (shards / ".metadata").unlink()
    assert "has no .metadata" in refused("export", shards, tmp_path / "out")


def test_a_run_whose_newest_is_damaged_gives_the_one_before(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(checkpoint.parent.parent, folder)
    (folder / "checkpoints" / "newer.ckpt").write_bytes(checkpoint.read_bytes()[:-3000])
    code, _, err = said_by("export", folder, tmp_path / "out")
    assert code == 0 and "passed over" in err and "newer.ckpt" in err and checkpoint.name in err


def test_another_programs_checkpoint(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    assert "is not one that popo fit wrote" in refused("export", tmp_path / "other.ckpt", tmp_path / "out")
    torch.save({"pytorch-lightning_version": "2", "state_dict": {}}, tmp_path / "empty.ckpt")
    assert "does not say which model" in refused("export", tmp_path / "empty.ckpt", tmp_path / "out")


def test_weights_alone_are_enough_with_a_base(checkpoint: Path, policy: Path, tmp_path: Path) -> None:
    """checkpoint.save_weights_only leaves such files. This one is away from its run."""
    state = torch.load(checkpoint, weights_only=True)
    kept = {name: state[name] for name in ("pytorch-lightning_version", "state_dict", "policy_shapes")}
    torch.save(kept, tmp_path / "alone.ckpt")
    assert "name it by --base" in refused("export", tmp_path / "alone.ckpt", tmp_path / "out")
    code, _, err = said_by("export", tmp_path / "alone.ckpt", tmp_path / "out", "--base", policy)
    assert code == 0, err
    assert "trained by `unknown` on `unknown`" in (tmp_path / "out" / "README.md").read_text()


def test_what_a_path_means(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    for place in (run, checkpoint.parent, checkpoint):
        found = saved_policy(str(place))
        assert (found.checkpoint, found.run) == (checkpoint, run)
        assert (found.iterations, found.under_way, found.record and found.record.task) == (1, 0, "tiny")
    with pytest.raises(SettingError, match="--best is given"):
        saved_policy(str(checkpoint), best=True)


def test_an_iteration_is_under_way_while_it_has_minibatches_left() -> None:
    """Stopped in the evaluation after its last one, it has no row yet, and its checkpoint the name of the iteration."""
    monitor = {"callbacks": {"Monitor": {"steps": [{}, {}, {}]}}}
    for left, expected in ((0, (4, 0)), (1, (3, 2)), (2, (3, 1))):
        data = {"iteration": 4, "steps": 3, "ranks": [{"pending": [None] * left}]}
        found = SavedPolicy(Path("a.ckpt"), None, monitor | {"RolloutDataModule": data})
        assert (found.iterations, found.under_way) == expected == progress(4, 3, left)


def test_settings_by_dotted_name() -> None:
    assert nested({"a.b.c": "1", "a.b.d": "[2]", "a.e": "null"}) == {"a": {"b": {"c": 1, "d": [2]}, "e": None}}
