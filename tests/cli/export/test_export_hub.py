"""A run whose model is on the hub is exported with the files of the commit that it was trained from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.exports import newest, state_of, tensors
from helpers.tiny_models import byte_tokenizer, environment, method, random_model

from popo_lightning.model.policy_checkpoint import REVISION

HUB_ID = "owner/model"


def command(home: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs popo without a network, with its own cache of the hub."""
    return subprocess.run(
        [sys.executable, "-m", "popo_lightning", *map(str, args)],
        env=environment() | {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def commit(home: Path, name: str, mark: str) -> None:
    """Makes the newest commit of the model, whose chat template has the mark."""
    repository = home / "hub" / ("models--" + HUB_ID.replace("/", "--"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = f"{mark}{tokenizer.chat_template}"
    random_model("llama-untied", repository / "snapshots" / name, tokenizer)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(name)


@pytest.mark.slow
def test_the_commit_that_it_was_trained_from(tmp_path: Path) -> None:
    first, later = "0" * 40, "1" * 40
    commit(tmp_path, first, "first:")
    task = {"class_path": "popo_lightning.toys.arithmetic.Arithmetic", "init_args": {"held_out_per_kind": 2}}
    data = {"task": task, "engine": "popo_lightning.engines.transformers.TransformersEngine", "group_size": 2}
    config = {
        "run": {"task": "sums", "folder": str(tmp_path / "run")},
        "model": {"path": HUB_ID, "optimizer": "torch.optim.AdamW"},
        "data": {**data, "problems_per_iteration": 4, "minibatches": 1, "max_new_tokens": 6},
        "evaluation": {"samples": 0},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = command(tmp_path, "fit", "--config", tmp_path / "config.yaml", *method("any_group"))
    assert done.returncode == 0, done.stderr[-4000:]
    run, out = tmp_path / "run", tmp_path / "out"
    assert state_of(newest(run))[REVISION] == first
    commit(tmp_path, later, "later:")
    for file in (tmp_path / "hub").glob(f"*/snapshots/{later}/model.safetensors"):
        file.write_bytes(b"")  # of which nobody may read
    done = command(tmp_path, "export", run, out)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (out / "chat_template.jinja").read_text().startswith("first:") and tensors(out)
    card = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert (card["base_model"], card["base_model_relation"]) == (HUB_ID, "finetune")
    assert card["popo_lightning"]["base_model_revision"] == first
    done = command(tmp_path, "sample", run, "7 - 4", "--gold", "3", "--n", "2")
    assert done.returncode == 0 and done.stdout.count("acc ") == 2, done.stderr[-4000:]
    (tmp_path / "hub").rename(tmp_path / "gone")
    done = command(tmp_path, "export", run, tmp_path / "other")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"revision {first}" in done.stderr
    assert "--base" in done.stderr and json.loads((out / "config.json").read_text())["model_type"] == "llama"
