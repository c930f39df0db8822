"""POPO on complete real data sets, with real vLLM, real graders, real images and replayed groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.places import REPOSITORY
from helpers.tiny_models import byte_tokenizer, method, metrics, popo_process, random_model, random_vision_model

DATA = REPOSITORY.parent / "shared" / "data"
TASKS = {"countdown": "qwen2", "gsm8k": "qwen2", "geometry": "vision"}


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not on this machine")
@pytest.mark.parametrize("name", TASKS)
def test_popo_on_real_data(name: str, tmp_path: Path) -> None:
    """An untrained model is never right, so the overlong penalty makes groups effective."""
    tokenizer = byte_tokenizer()
    if TASKS[name] == "vision":
        model = random_vision_model(tmp_path / "model", tokenizer)
    else:
        model = random_model(TASKS[name], tmp_path / "model", tokenizer)
    configs = REPOSITORY / "configs" / "task"
    finished = popo_process(
        "fit",
        *("--config", configs / f"{name}.yaml", "--config", configs / f"{name}_local.yaml", *method("popo")),
        *("--data.task.folder", DATA, "--model.path", model, "--run.folder", tmp_path / "run"),
        *("--data.problems_per_iteration", "8", "--data.group_size", "4", "--data.minibatches", "2"),
        *("--data.max_new_tokens", "48", "--data.max_prompt_tokens", "1500", "--data.image_pixels", "[784,12544]"),
        *("--data.overlong", "popo_lightning.grading.overlong.SoftOverlong", "--data.overlong.buffer_tokens", "47"),
        *("--evaluation.samples", "1", "--evaluation.avg_k", "1", "--evaluation.pass_k", "1"),
        *("--evaluation.limit", "4", "--evaluation.benchmarks", "{}", "--evaluation.at_start", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "3", "--model.optimizer.init_args.lr", "0.001"),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = [row for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert sum(row["replay/groups"] for row in rows) > 0
    assert all(row["rollout/grading_failures"] == 0 and row["engine/logp_gap_max"] < 1e-4 for row in rows)
    assert all(row["reward/acc"] == 0 and row["reward/overlong"] < 0 for row in rows)
    written = [
        json.loads(line)
        for file in (tmp_path / "run" / "evaluations").rglob("*.jsonl")
        for line in file.read_text("utf-8").splitlines()
    ]
    assert {row["benchmark"] for row in written} and all(row["parts"]["acc"] == 0 for row in written)
