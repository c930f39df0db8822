"""A resumed run equals the uninterrupted one bit for bit: rollouts, buffer, proximal log-probs, weights and metrics."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_command_line import digests
from helpers.tiny_models import method, metrics, popo, popo_process, weights_of
from torch import Tensor

ITERATIONS = 6
MINIBATCHES = 3
EVERY_STEP = ["--checkpoint.every_n_epochs", "null", "--checkpoint.every_n_train_steps", "1"]


def weights_in(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the weights. weights_only shows that the file needs no pickled code."""
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def checkpoint(folder: Path, step: int) -> Path:
    found = [path for path in (folder / "checkpoints").glob("*.ckpt") if step_of(path) == step]
    return max(found, key=lambda path: path.stat().st_mtime_ns)  # a resumed run writes again with -v1


def step_of(path: Path) -> int:
    """Returns the optimizer steps before a checkpoint, by its usual name or by the filename {step}."""
    if (own := re.search(r"step=(\d+)", path.stem)) is not None:
        return int(own[1])
    found = re.fullmatch(r"iteration-(\d+)(?:-minibatch-(\d+))?(?:-v\d+)?", path.stem)
    assert found is not None, path
    return int(found[1]) * MINIBATCHES + int(found[2] or 0)


def assert_same_run(resumed: Path, whole: Path) -> None:
    assert metrics(resumed) == metrics(whole)
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    last = ITERATIONS * MINIBATCHES
    left, right = weights_in(checkpoint(resumed, last)), weights_in(checkpoint(whole, last))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def command(config: Path) -> list[str | Path]:
    samples = ["--samples.every_n_iterations", "1"]
    buffer = ["--data.composer.buffer.capacity", "12"]
    keep_all = ["--checkpoint.every_n_epochs", "2", "--checkpoint.save_top_k", "-1"]
    return ["fit", "--config", config, *method("popo"), *buffer, *keep_all, *samples]


@pytest.fixture(scope="module")
def whole(command: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    popo(*command, "--run.folder", folder)
    rows = metrics(folder)
    assert sum(row.get("replay/groups", 0) for row in rows) > 0, "a run without replay would not test the buffer"
    return folder


def copy_until(whole: Path, step: int, target: Path) -> Path:
    """Copies the run's folder without later checkpoints, but with everything else written later."""
    shutil.copytree(whole, target)
    for path in (target / "checkpoints").glob("*.ckpt"):
        if step_of(path) > step:
            path.unlink()
    return target


def test_stopped_between_iterations(
    command: list[str | Path], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    popo(*command, "--run.folder", tmp_path, "--trainer.max_epochs", "2", "--evaluation.every_n_iterations", "2")
    assert len(metrics(tmp_path)) < len(metrics(whole))
    popo(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert "settings have changed" not in capsys.readouterr().err
    assert_same_run(tmp_path, whole)


def test_resumed_by_checkpoint_path(command: list[str | Path], whole: Path, tmp_path: Path) -> None:
    """The checkpoint determines the folder. Rows written after it are replaced."""
    folder = copy_until(whole, 99, tmp_path / "copy")
    popo(*command, "--ckpt_path", checkpoint(folder, 4 * MINIBATCHES))
    assert_same_run(folder, whole)
    assert (folder / "metrics.csv.before-resume").exists()


def test_resumed_by_the_config_of_a_copy(whole: Path, tmp_path: Path) -> None:
    """That config.yaml names the folder it was copied from, whose run must stay as it is."""
    before = digests(whole)
    folder = copy_until(whole, 4 * MINIBATCHES, tmp_path / "copy")
    (folder / "summary.json").unlink()
    popo("fit", "--config", folder / "config.yaml", "--run.resume", "true")
    assert_same_run(folder, whole)
    assert digests(whole) == before


@pytest.mark.slow
def test_killed_inside_an_iteration(command: list[str | Path], whole: Path, tmp_path: Path) -> None:
    """In the shell, kill -9 comes at the second minibatch of iteration 4. The newest checkpoint is of iteration 2."""
    kill = ["--trainer.callbacks+", "helpers.tiny_models.KillAt", "--trainer.callbacks.iteration", "4"]
    killed = popo_process(*command, *kill, "--trainer.callbacks.minibatch", "1", "--run.folder", tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in metrics(tmp_path) if "train/loss" in row] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [checkpoint(whole, 6).name]
    popo(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert_same_run(tmp_path, whole)


@pytest.fixture(scope="module")
def every_step(command: list[str | Path], whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every_step")
    popo(*command, *EVERY_STEP, "--run.folder", folder)
    assert_same_run(folder, whole)  # writing checkpoints changes nothing
    assert len(list((folder / "checkpoints").iterdir())) == ITERATIONS * MINIBATCHES
    return folder


@pytest.mark.parametrize("step", [7, 8, 9, 10, 12, 17, 18])
def test_stopped_inside_an_iteration(
    command: list[str | Path], every_step: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    """It stops after each minibatch, including the last one, whose iteration is not logged yet."""
    path = checkpoint(every_step, step)
    pending = torch.load(path, weights_only=True)["RolloutDataModule"]["ranks"][0]["pending"]
    assert len(pending) == -step % MINIBATCHES
    assert all("prox_logp" in minibatch.recorded for minibatch in pending)
    folder = copy_until(every_step, step, tmp_path / "copy")
    popo(*command, *EVERY_STEP, "--run.folder", folder, "--run.resume", "true")
    assert_same_run(folder, whole)


def test_stopped_before_the_first_checkpoint(command: list[str | Path], tmp_path: Path) -> None:
    """There is nothing to resume, so the run begins anew in its folder instead of being refused."""
    short = ["--run.folder", tmp_path, "--trainer.max_epochs", "1", "--run.resume", "true"]
    popo(*command, *short)
    first = metrics(tmp_path)
    (tmp_path / "summary.json").unlink()  # as if it had not ended
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    popo(*command, *short)
    assert metrics(tmp_path) == first


def test_command_line_is_in_force(
    command: list[str | Path], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state in a checkpoint must not override the present command."""
    folder = copy_until(whole, 2 * MINIBATCHES, tmp_path / "copy")
    changed = [
        "--model.max_grad_norm",
        "0.01",
        "--model.trust_region",
        "popo_lightning.objectives.trust_regions.PPOClip",
    ]
    changed += ["--model.trust_region.clip_high", "0.05", "--data.temperature", "0.9"]
    changed += ["--data.composer.buffer.capacity", "3"]
    changed += ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.000123"]
    cli = popo(*command, *changed, "--run.folder", folder, "--run.resume", "true", "--trainer.max_epochs", "3")
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "settings have changed" in line]
    assert "model.max_grad_norm 1.0 -> 0.01, " in told and told.endswith(", data.temperature 1.0 -> 0.9")
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.000123
    assert cli.model.max_grad_norm == 0.01
    assert cli.model.objective.trust_region.clip_high == 0.05
    assert cli.model.temperature == cli.datamodule.sampling.temperature == 0.9
    assert len(cli.datamodule.composer.buffer) <= 3
    assert cli.trainer.global_step == 3 * MINIBATCHES
    rows, before = metrics(folder), metrics(whole)
    third = [next(row for row in found if row["step"] == 3 and "train/loss" in row) for found in (rows, before)]
    assert third[0]["policy/entropy"] != third[1]["policy/entropy"]
    earlier = [[row for row in found if row["step"] <= 2] for found in (rows, before)]
    assert earlier[0] == earlier[1]


def test_checkpoints_hold_no_code(whole: Path) -> None:
    state: dict[str, Any] = torch.load(checkpoint(whole, 6), weights_only=True)
    assert state["RolloutDataModule"]["iteration"] == 2
    assert state["RolloutDataModule"]["ranks"][0]["composer"]["buffer"]["groups"]
    assert "hyper_parameters" not in state


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_resumes_bit_for_bit(command: list[str | Path], tmp_path: Path) -> None:
    """Uses the real engine in three processes: buffer, sampler, engine and optimizer."""
    engine = ["--data.engine", "popo_lightning.engines.vllm.engine.VLLMEngine", "--checkpoint.every_n_epochs", "1"]
    for folder, more in (
        ("whole", ["--trainer.max_epochs", "4"]),
        ("parts", ["--trainer.max_epochs", "2"]),
        ("parts", ["--trainer.max_epochs", "4", "--run.resume", "true"]),
    ):
        finished = popo_process(*command, *engine, "--run.folder", tmp_path / folder, *more)
        assert finished.returncode == 0, finished.stderr
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    left, right = (weights_in(checkpoint(tmp_path / name, 4 * MINIBATCHES)) for name in ("parts", "whole"))
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_weights_are_those_of_the_module(command: list[str | Path], whole: Path, tmp_path: Path) -> None:
    """The checkpoint of the last step contains the policy at the end of training."""
    folder = copy_until(whole, 4 * MINIBATCHES, tmp_path / "copy")
    cli = popo(*command, "--run.folder", folder, "--run.resume", "true")
    saved = weights_in(checkpoint(whole, ITERATIONS * MINIBATCHES))
    assert all(torch.equal(saved[name], weight) for name, weight in weights_of(cli.model).items())
