"""A run of adapters resumes bit for bit from checkpoints of adapters alone, but only with the same base weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.exports import state_of
from helpers.tiny_models import method, metrics, popo, tiny_policy

from runs.test_resume import ITERATIONS, MINIBATCHES, assert_same_run, checkpoint, copy_until, weights_in

LORA = ["--model.lora", "{r: 3, alpha: 12}", "--data.weight_sync_interval", "2"]
RULES = ["--data.composer.buffer.capacity", "12", "--samples.every_n_iterations", "1"]
KEEP = ["--checkpoint.every_n_epochs", "null", "--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
KEEP += ["--checkpoint.filename", "{step}"]


@pytest.fixture(scope="module")
def command(config: Path) -> list[str | Path]:
    return ["fit", "--config", config, *method("popo"), *LORA, *RULES, *KEEP]


@pytest.fixture(scope="module")
def whole(command: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    popo(*command, "--run.folder", folder)
    assert sum(row.get("replay/groups", 0) for row in metrics(folder)) > 0
    return folder


def test_checkpoints_hold_adapters_and_their_optimizer(whole: Path) -> None:
    last = checkpoint(whole, ITERATIONS * MINIBATCHES)
    weights = weights_in(last)
    assert len(weights) == 28 and all(".lora_A." in name or ".lora_B." in name for name in weights)
    state = state_of(last)
    assert len(state["optimizer_states"][0]["state"]) == 28
    assert state["RolloutDataModule"]["rollout_weights"]["_kept"].keys() == {n.removeprefix("model.") for n in weights}
    numbers = sum(weight.numel() for weight in weights.values())
    base = sum(p.stat().st_size for p in tiny_policy().folder().glob("*.safetensors")) / 4
    assert numbers < base / 8
    first = weights_in(checkpoint(whole, 1))
    assert any(not torch.equal(first[name], weights[name]) for name in weights)


@pytest.mark.parametrize("step", [6, 8])
def test_resumed_bit_for_bit(command: list[str | Path], whole: Path, tmp_path: Path, step: int) -> None:
    """It resumes between two iterations, and inside one with delayed weights."""
    folder = copy_until(whole, step, tmp_path / "resumed")
    popo(*command, "--run.folder", folder, "--run.resume", "true")
    assert_same_run(folder, whole)


def test_beside_other_weights_it_is_refused(
    command: list[str | Path], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_policy().folder(), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    place = ["--model.warm_start", "null", "--model.path", other, "--run.folder", tmp_path / "run"]
    with pytest.raises(SystemExit) as ended:
        popo(*command, *place, "--ckpt_path", checkpoint(whole, 6))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "the checkpoint's adapters belong to other weights" in said
    assert not (tmp_path / "run" / "metrics.csv").exists()
