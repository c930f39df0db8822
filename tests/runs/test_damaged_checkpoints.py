"""A checkpoint whose bytes have changed since they were written: no run continues from it, and none evaluates it."""

from __future__ import annotations

import os
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.exports import as_shards, flipped, said_by, state_of
from helpers.nodes import one_node
from helpers.tiny_models import method, popo
from torch import Tensor
from torch.distributed.checkpoint import save as save_shards

from popo_lightning.core.errors import SettingError
from popo_lightning.runs import folder as run_folder
from popo_lightning.runs.checkpoint_files import flaw
from popo_lightning.runs.checksums import check_bytes, damage
from popo_lightning.runs.folder import newest_undamaged
from popo_lightning.runs.record import read_record
from popo_lightning.runs.shards import _Part

Args = list[str | Path]
EACH = ["--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "-1"]
WEIGHT = "model.model.layers.1.mlp.up_proj.weight"
NOT_WRITTEN = f"the bytes of {WEIGHT} are not those that were written"


@pytest.fixture(scope="module")
def command(config: Path) -> Args:
    without = ["--evaluation.every_n_iterations", "0", "--evaluation.at_start", "false", "--evaluation.samples", "0"]
    return ["fit", "--config", config, *method("popo"), *without, *EACH]


@pytest.fixture(scope="module")
def whole(command: Args, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after each of its two iterations."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    popo(*command, "--run.folder", folder, "--trainer.max_epochs", "2")
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def after(run: Path, iterations: int) -> Path:
    return run / "checkpoints" / f"iteration-{iterations:04d}.ckpt"


def with_a_changed_weight(checkpoint: Path) -> Path:
    flipped(checkpoint, state_of(checkpoint)["state_dict"][WEIGHT].numpy().tobytes())
    assert flaw(checkpoint) is None, "it looks complete"
    return checkpoint


# -- what is noticed ---------------------------------------------------------------------------------------------


def test_one_changed_bit_of_anything(whole: Path, tmp_path: Path) -> None:
    """Weights, optimizer and the rest of a file."""
    assert damage(after(whole, 2)) is None
    copied = Path(shutil.copy(after(whole, 2), tmp_path))
    content = copied.read_bytes()
    with zipfile.ZipFile(copied) as archive:
        entries = [archive.read(entry) for entry in archive.infolist() if entry.file_size >= 4]
    unique = [entry for entry in entries if content.count(entry) == 1][::7]
    assert len(unique) > 10
    for entry in unique:
        flipped(copied, entry)
        assert damage(copied), entry[:20]
        copied.write_bytes(content)
    assert damage(copied) is None


def test_what_has_changed_is_named(whole: Path, tmp_path: Path) -> None:
    copied = with_a_changed_weight(Path(shutil.copy(after(whole, 2), tmp_path)))
    assert damage(copied) == NOT_WRITTEN
    moment: Tensor = state_of(after(whole, 2))["optimizer_states"][0]["state"][3]["exp_avg"]
    flipped(Path(shutil.copy(after(whole, 2), tmp_path)), moment.numpy().tobytes())
    assert "the bytes of optimizer_states.0.state.3.exp_avg are not" in str(damage(copied))
    with pytest.raises(SettingError, match=r"iteration-0002.ckpt' is damaged \(the bytes of optim.*; name another one"):
        check_bytes(copied)


def test_shards(whole: Path, tmp_path: Path) -> None:
    shards = as_shards(after(whole, 2), tmp_path / "shards.ckpt")
    assert damage(shards) is None
    weight = state_of(after(whole, 2))["state_dict"][WEIGHT].numpy().tobytes()
    flipped(next(shards.glob("*.distcp")), weight)
    assert f"the bytes of state_dict.{WEIGHT} are not those that were written" in str(damage(shards))


def test_a_part_of_any_length_takes_no_memory(tmp_path: Path) -> None:
    """The length is a stranger's, and a sparse file takes no room on the disk."""
    (tmp_path / "sparse").write_bytes(b"")
    os.truncate(tmp_path / "sparse", 2**30)
    tracemalloc.start()
    with (tmp_path / "sparse").open("rb") as file, pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(_Part(file, 0, 2**30)).testzip()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_shards_hold_more_than_tensors(tmp_path: Path) -> None:
    """FSDP2 writes the optimizer's settings as bytes beside the tensors."""
    shards = tmp_path / "shards.ckpt"
    save_shards({"weight": torch.ones(3), "words": "a setting of the optimizer"}, checkpoint_id=shards, no_dist=True)
    torch.save({}, shards / "meta.pt")
    assert damage(shards) is None
    flipped(next(shards.glob("*.distcp")), b"a setting of the optimizer")
    assert "the bytes of words are not those that were written" in str(damage(shards))


@pytest.mark.parametrize("kind", ["cut", "gone", "contents", "rest"])
def test_shards_of_which_a_part_is_missing(whole: Path, tmp_path: Path, kind: str) -> None:
    shards = as_shards(after(whole, 2), tmp_path / "shards.ckpt")
    part = next(shards.glob("*.distcp"))
    if kind == "cut":
        part.write_bytes(part.read_bytes()[:-3000])
    elif kind == "gone":
        part.unlink()
    elif kind == "contents":
        (shards / ".metadata").write_bytes(b"x")
    else:
        with zipfile.ZipFile(shards / "meta.pt") as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            content = archive.read(largest)
        flipped(shards / "meta.pt", content)
    assert damage(shards)


def test_the_newest_of_several_folders(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, iterations in (("a", 1), ("b", 2)):
        (tmp_path / place).mkdir()
        shutil.copy(after(whole, iterations), tmp_path / place)
    folders = [tmp_path / "a", tmp_path / "b"]
    assert newest_undamaged(folders) == tmp_path / "b" / "iteration-0002.ckpt"
    with_a_changed_weight(tmp_path / "b" / "iteration-0002.ckpt")
    assert newest_undamaged(folders) == tmp_path / "a" / "iteration-0001.ckpt"
    with_a_changed_weight(tmp_path / "a" / "iteration-0001.ckpt")
    assert newest_undamaged(folders) is None
    assert len(capsys.readouterr().err.splitlines()) == 2, "each is named once"


def test_another_rank_takes_the_same_and_says_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_changed_weight(after(run, 2))
    monkeypatch.setattr(run_folder, "is_first_rank", lambda: False)
    assert newest_undamaged([run / "checkpoints"]) == after(run, 1) and capsys.readouterr().err == ""


# -- the commands ------------------------------------------------------------------------------------------------


def test_resuming_takes_the_one_before(
    command: Args, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends as if the damaged one had never been written."""
    damaged = with_a_changed_weight(after(run, 2))
    before = damaged.read_bytes()
    (run / "summary.json").unlink()
    cli = popo(*command, "--run.folder", run, "--run.resume", "true", "--trainer.max_epochs", "2")
    assert cli.trainer.ckpt_path == str(after(run, 1)) and damaged.read_bytes() == before
    said = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert said == [f"popo: passed over {damaged}, which is damaged ({NOT_WRITTEN})"]
    again, expected = (
        state_of(path)["state_dict"] for path in (run / "checkpoints" / "iteration-0002-v1.ckpt", after(whole, 2))
    )
    assert [name for name in expected if not torch.equal(again[name], expected[name])] == []


def test_nothing_is_left_to_resume_from(command: Args, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after(run, 1).unlink()
    with_a_changed_weight(after(run, 2))
    with pytest.raises(SystemExit, match="2"):
        popo(*command, "--run.folder", run, "--run.resume", "true", "--trainer.max_epochs", "3")
    passed, refusal = capsys.readouterr().err.splitlines()[-2:]
    assert "passed over" in passed and "has no checkpoint" in refusal and "name one by ckpt_path" in refusal


@pytest.mark.parametrize("kind", ["continued", "fork", "fork_in_a_folder", "validate"])
def test_one_that_is_named_is_refused(
    command: Args, config: Path, run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = with_a_changed_weight(after(run, 2))
    more = ["--ckpt_path", damaged, "--trainer.max_epochs", "4", "--run.root", tmp_path / "runs"]
    more += ["--seed_everything", "9"] if kind == "fork" else []
    more += ["--run.folder", tmp_path / "new", "--run.resume", "true"] if kind == "fork_in_a_folder" else []
    before = sorted(path for path in tmp_path.rglob("*") if path.name != "run.lock")
    args = ["validate", "--config", config, "--ckpt_path", damaged] if kind == "validate" else [*command, *more]
    with pytest.raises(SystemExit, match="2"):
        popo(*args)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"popo: the checkpoint '{damaged}' is damaged ({NOT_WRITTEN}); name another one"
    made = {path for path in tmp_path.rglob("*") if path.name != "run.lock"} - set(before)
    assert not [path for path in made if path.is_file()]


def test_validate_takes_the_one_before(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_a_changed_weight(after(run, 2))
    cli = popo("validate", "--config", run / "config.yaml", "--evaluation.limit", "2")
    assert cli.trainer.ckpt_path == str(after(run, 1)) and "passed over" in capsys.readouterr().err


def test_export_says_the_same(run: Path, tmp_path: Path) -> None:
    damaged = with_a_changed_weight(after(run, 2))
    code, _, err = said_by("export", damaged, tmp_path / "out")
    assert code == 2 and f"the checkpoint '{damaged}' is damaged (the bytes of {WEIGHT.removeprefix('model.')}" in err


@pytest.mark.slow
def test_two_ranks_take_the_one_before(config: Path, tmp_path: Path) -> None:
    args: Args = ["fit", "--config", config, *method("popo"), "--trainer.strategy", "ddp", "--run.folder", tmp_path]
    args += ["--data.problems_per_iteration", "8", "--evaluation.every_n_iterations", "0", "--run.resume", "true"]
    args += EACH
    one_node(2, *args, "--trainer.max_epochs", "2", seconds=200)
    damaged = with_a_changed_weight(after(tmp_path, 2))
    said = one_node(2, *args, "--trainer.max_epochs", "3", seconds=200)
    assert said.count("passed over") == 1 and f"continues from '{after(tmp_path, 1)}'" in said
    assert damaged.exists() and read_record(tmp_path) is not None and damage(after(tmp_path, 3)) is None
