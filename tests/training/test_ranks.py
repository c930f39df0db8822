"""Two ranks on one machine: unequal micro-batches, one checkpoint for both, and resuming from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.nodes import one_node
from helpers.servers import FakeServer
from helpers.tiny_models import method, metrics, random_vision_model

LIMIT_SECONDS = 150  # the test is about ranks that wait forever for each other


def two_ranks(*arguments: str | Path) -> None:
    one_node(2, *arguments, seconds=LIMIT_SECONDS)


@pytest.mark.slow
def test_two_ranks_train_and_resume(config: Path, tmp_path: Path) -> None:
    ranks = ["--trainer.strategy", "ddp", "--model.micro_batch_tokens", "60"]
    command = ["fit", "--config", config, *method("popo"), *ranks, "--run.folder", tmp_path]
    command += [
        "--checkpoint.every_n_epochs",
        "1",
        "--checkpoint.save_top_k",
        "-1",
        "--data.problems_per_iteration",
        "8",
    ]
    two_ranks(*command, "--trainer.max_epochs", "2")
    (newest,) = (tmp_path / "checkpoints").glob("iteration-0002.ckpt")
    ranks_saved = torch.load(newest, weights_only=True)["RolloutDataModule"]["ranks"]
    assert len(ranks_saved) == 2
    asked = [{group.problem.id for group, _ in rank["composer"]["buffer"]["groups"]} for rank in ranks_saved]
    assert asked[0] != asked[1], "ranks ask different problems"
    two_ranks(*command, "--trainer.max_epochs", "3", "--run.resume", "true")
    assert [row["step"] for row in metrics(tmp_path) if "train/loss" in row] == [1, 2, 3]


@pytest.mark.slow
def test_a_rank_without_an_image_does_not_leave_the_other_waiting(config: Path, tmp_path: Path) -> None:
    model = ["--model.warm_start", "null", "--model.path", random_vision_model(tmp_path / "model")]
    task = ["--data.task", "helpers.pictures.Pictures", "--data.task.text", "2"]
    ranks = ["--trainer.strategy", "ddp", "--model.micro_batch_tokens", "30"]
    budget = [
        "--data.problems_per_iteration",
        "8",
        "--data.group_size",
        "2",
        "--data.max_prompt_tokens",
        "40",
        "--trainer.max_epochs",
        "2",
    ]
    two_ranks(
        "fit", "--config", config, *method("popo"), *model, *task, *ranks, *budget, "--run.folder", tmp_path / "run"
    )
    rows = [row for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["replay/groups"] > 0


FSDP2 = ["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"]
FSDP2 += ["--trainer.strategy.data_parallel_size", "2", "--trainer.strategy.tensor_parallel_size", "1"]
FSDP2 += ["--trainer.strategy.save_distributed_checkpoint", "false"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [["--trainer.strategy", "ddp"], FSDP2], ids=["ddp", "fsdp2"])
def test_ranks_share_servers_and_only_the_first_sends_weights(
    config: Path, tmp_path: Path, strategy: list[str]
) -> None:
    """The run trains on noise, one iteration ahead. It tests who asks, who sends, and that no rank waits forever."""
    servers = [FakeServer(), FakeServer()]
    try:
        urls = json.dumps([server.url for server in servers])
        engine = ["--data.engine", "popo_lightning.engines.servers.engine.ServerEngine", "--data.engine.urls", urls]
        ranks = [*strategy, "--data.problems_per_iteration", "8", "--data.minibatches", "2"]
        command = ["fit", "--config", config, *method("grpo"), *engine, *ranks, "--run.folder", tmp_path]
        two_ranks(*command, "--monitor.gap_error", "null", "--data.async_level", "1", "--trainer.max_epochs", "2")
    finally:
        for server in servers:
            server.close()
    assert [row["step"] for row in metrics(tmp_path) if "train/loss" in row] == [1, 2]
    for server in servers:
        # Each rank asks for the description. One rank sends, for two iterations and the evaluation of the last policy.
        assert server.paths.count("/collective_rpc") == 2 + 3
        assert len(server.weights) > 10 and server.version.endswith("-3-2")
    asked = [request["sampling_params"] for server in servers for request in server.requests]
    seeds = [request["seed"] for request in asked if request["n"] == 4]  # evaluations ask for fewer responses
    # Prompts of each rank. The gap check asks after loading and after the first sync, the probe after both syncs.
    compared = 2 * 2
    assert len(seeds) == 3 * 8 + 4 * compared and len(set(seeds)) == 3 * 8 + compared
