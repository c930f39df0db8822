"""FSDP2 over two processes on a CPU trains as one process does, and continues from two to one and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.nodes import fsdp2, one_node
from helpers.places import REPOSITORY
from helpers.tiny_models import method, metrics, popo_process
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from popo_lightning.core.errors import SettingError
from popo_lightning.methods.mopps import MoPPS
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.methods.score_priority import ScorePriority
from popo_lightning.model.sharding import check_checkpoint, check_sharding, settle_strategy
from popo_lightning.replay.buffer import GroupReplayBuffer, redistribute
from popo_lightning.rollout.rank_states import reshard
from popo_lightning.tasks.samplers import EpochSampler

LIMIT_SECONDS = 200
SAME = [
    "--data.engine",
    "helpers.tiny_models.EngineByProblem",
    "--data.minibatches",
    "1",
    "--data.problems_per_iteration",
    "8",
]
# With its usual eps of 1e-8, Adam would turn a gradient that is only rounding into a step of the learning rate.
SAME += ["--model.optimizer.init_args.eps", "0.01", "--model.optimizer.init_args.lr", "0.02"]
EVERY = ["--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "-1"]
# Columns whose last bits depend on the order of a sum, or on how rows are padded.
CLOSE = (
    "train/loss",
    "train/grad_norm",
    "policy/entropy",
    "policy/ratio_mean",
    "reward/score",
    "rollout/response_tokens",
)
SAME_COUNTS = ("rollout/effective_share", "total/responses", "total/tokens", "train/tokens", "replay/trained_groups")


def sharded(ranks: int, *arguments: str | Path, whole_checkpoints: bool = False) -> None:
    """Runs popo with FSDP2."""
    one_node(ranks, *arguments, *fsdp2(ranks, whole_checkpoints), seconds=LIMIT_SECONDS)


def near(value: float, step: float) -> Any:
    """Allows for rounding, which each step at so large a learning rate amplifies: 1e-4 was seen at the fourth."""
    return pytest.approx(value, abs=1e-5, rel=1e-5 if step == 1 else 1e-3)


def trained(folder: Path) -> list[dict[str, float]]:
    return [row for row in metrics(folder) if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole"), [("grpo", False), ("popo_ppo", True)])
def test_one_process_two_ranks_and_a_change_between_them_train_alike(
    config: Path, tmp_path: Path, name: str, whole: bool
) -> None:
    command = ["fit", "--config", config, *method(name), *SAME, *EVERY]
    if name == "popo_ppo":  # without replay, because stored groups stay with their rank
        command += ["--data.composer", "popo_lightning.replay.composer.OnPolicy"]
    sharded(1, *command, "--run.folder", tmp_path / "one", "--trainer.max_epochs", "4", whole_checkpoints=whole)
    changing = [*command, "--run.folder", tmp_path / "changing", "--run.resume", "true"]
    sharded(2, *changing, "--trainer.max_epochs", "2", whole_checkpoints=whole)
    sharded(1, *changing, "--trainer.max_epochs", "3", whole_checkpoints=whole)
    sharded(2, *changing, "--trainer.max_epochs", "4", whole_checkpoints=whole)
    one, changed = trained(tmp_path / "one"), trained(tmp_path / "changing")
    assert [row["step"] for row in changed] == [1, 2, 3, 4]
    assert any(row["train/grad_norm"] > 0 for row in one)
    for alone, together in zip(one, changed, strict=True):
        for metric in [*CLOSE, *(["train/value_loss"] if name == "popo_ppo" else [])]:
            assert together[metric] == near(alone[metric], alone["step"]), (metric, alone["step"])
        for metric in SAME_COUNTS:
            assert together[metric] == alone[metric], (metric, alone["step"])


@pytest.mark.slow
def test_a_target_critic_is_split_and_resumed_by_other_ranks(config: Path, tmp_path: Path) -> None:
    command = ["fit", "--config", config, *method("ppo_target"), *SAME, *EVERY, "--model.critic.lr", "0.02"]
    command += ["--model.critic.target", "{polyak: 0.25, momentum: 0.5, anchor: 0.1}"]
    sharded(1, *command, "--run.folder", tmp_path / "one", "--trainer.max_epochs", "2", whole_checkpoints=True)
    changing = [*command, "--run.folder", tmp_path / "changing", "--run.resume", "true"]
    sharded(2, *changing, "--trainer.max_epochs", "1", whole_checkpoints=True)
    sharded(1, *changing, "--trainer.max_epochs", "2", whole_checkpoints=True)
    states = []
    for name in ("one", "changing"):
        (newest,) = (tmp_path / name / "checkpoints").glob("iteration-0002.ckpt")
        states.append(torch.load(newest, weights_only=True)["state_dict"])
    one, changed = states
    copied = [name for name in one if name.startswith("value_target.")]
    assert any("speed" in name for name in copied) and one.keys() == changed.keys()
    moved = [name for name in copied if "speed" not in name]
    lag = max(float((one[each] - one[each.replace("target.model", "model")]).abs().max()) for each in moved)
    assert lag > 1e-3
    assert max(float((one[each] - changed[each]).abs().max()) for each in copied) < 0.05 * lag


@pytest.mark.slow
def test_twin_gaussian_heads_are_split(config: Path, tmp_path: Path) -> None:
    command = ["fit", "--config", config, *method("ppo_gaussian"), *SAME, *EVERY, "--model.critic.heads", "2"]
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        sharded(ranks, *command, "--run.folder", folder, "--trainer.max_epochs", "1", whole_checkpoints=True)
    (one,), (two,) = trained(tmp_path / "1"), trained(tmp_path / "2")
    for metric in ("train/loss", "train/grad_norm", "train/value_loss"):
        assert two[metric] == near(one[metric], 1)
    stds = []
    for ranks in "12":
        state = torch.load(tmp_path / ranks / "checkpoints" / "iteration-0001.ckpt", weights_only=True)["state_dict"]
        stds.append(state["value_model.running_std"])
    torch.testing.assert_close(stds[0], stds[1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_nested_critic_resumes_from_its_first_stage(config: Path, tmp_path: Path) -> None:
    """The groups' parts have learned nothing so far, but the optimizer must have state for them."""
    nested = "{field: level, groups: ['2'], shared_iterations: 1}"
    head = f"{{class_path: popo_lightning.model.nested_head.NestedHead, init_args: {nested}}}"
    command = ["fit", "--config", config, *method("ppo"), *SAME, *EVERY, "--model.critic.head", head]
    command += ["--run.folder", tmp_path, "--run.resume", "true"]
    sharded(1, *command, "--trainer.max_epochs", "1")
    sharded(1, *command, "--trainer.max_epochs", "2")
    assert [row["step"] for row in trained(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_replay_over_sharded_ranks(config: Path, tmp_path: Path) -> None:
    """This rule's passes over stored groups differ by rank."""
    command = ["fit", "--config", config, *method("popo_rested"), "--data.problems_per_iteration", "8", *EVERY]
    command += ["--model.micro_batch_tokens", "60", "--run.folder", tmp_path, "--run.resume", "true"]
    command += ["--data.composer.min_ess", "0", "--data.composer.rest_interval", "1"]  # so that it surely replays
    sharded(2, *command, "--trainer.max_epochs", "3")
    sharded(1, *command, "--trainer.max_epochs", "4")
    rows = trained(tmp_path)
    assert rows[-1]["step"] == 4 and sum(row["replay/groups"] for row in rows) > 0


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["ddp", "fsdp2"])
def test_lightning_starts_the_ranks_itself(config: Path, tmp_path: Path, scale: str) -> None:
    """Two ranks start without torchrun or SLURM, from a file for eight ranks with one changed setting."""
    files = ["--config", config, *method("popo"), "--config", REPOSITORY / "configs" / "scale" / f"{scale}.yaml"]
    ranks = ["--trainer.devices", "2", "--model.micro_batch_tokens", "60"]
    here = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--run.folder", tmp_path]
    budget = ["--data.problems_per_iteration", "8", "--trainer.max_epochs", "2"]
    finished = popo_process("fit", *files, *ranks, *here, *budget)
    assert finished.returncode == 0, finished.stderr[-5000:]
    rows = trained(tmp_path)
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["total/responses"] == 2 * 8 * 4
    assert rows[0]["train/grad_norm"] > 0


def test_what_sharding_cannot_do_is_refused() -> None:
    sizes: list[dict[str, int]] = [
        {"data_parallel_size": 2, "tensor_parallel_size": 2},
        {"data_parallel_size": 2},
        {"tensor_parallel_size": 4},
    ]
    for given in sizes:
        strategy = ModelParallelStrategy(**given)  # type: ignore[arg-type]
        settle_strategy(strategy, 4)
        with pytest.raises(SettingError, match="set them to 4"):
            check_sharding(strategy, 4)
    with pytest.raises(SettingError, match="static_graph is true"):
        check_sharding(DDPStrategy(static_graph=True), 4)
    check_sharding(DDPStrategy(), 4)
    check_sharding(ModelParallelStrategy(4, 1), 4)
    check_sharding(SingleDeviceStrategy(), 1)
    with pytest.raises(SettingError, match="FSDP2"):
        check_sharding(FSDPStrategy(), 4)


def test_what_nobody_has_decided_is_settled() -> None:
    for given in ({}, {"data_parallel_size": 4}, {"tensor_parallel_size": 1}):
        split = ModelParallelStrategy(**given)  # type: ignore[arg-type]
        settle_strategy(split, 4)
        assert (split._data_parallel_size, split._tensor_parallel_size) == (4, 1)
        check_sharding(split, 4)
    plain, told = DDPStrategy(), DDPStrategy(gradient_as_bucket_view=False)
    settle_strategy(plain, 4)
    settle_strategy(told, 4)
    assert [each._ddp_kwargs["gradient_as_bucket_view"] for each in (plain, told)] == [True, False]
    settle_strategy(SingleDeviceStrategy(), 1)


def test_a_folder_of_shards_needs_the_strategy_that_wrote_it(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="folder of shards"):
        check_checkpoint(str(tmp_path), SingleDeviceStrategy())
    check_checkpoint(str(tmp_path), ModelParallelStrategy(1, 1))
    check_checkpoint(str(tmp_path / "epoch=1-step=2.ckpt"), SingleDeviceStrategy())
    check_checkpoint(None, SingleDeviceStrategy())


def test_stores_are_dealt_out_newest_first_and_keep_their_order() -> None:
    assert redistribute([[1, 3, 5], [4]], 1) == [[1, 3, 4, 5]]
    assert redistribute([[1, 3, 5], [4]], 2) == [[3, 5], [1, 4]]
    assert redistribute([[], []], 3) == [[], [], []]


def test_rank_states_move_between_iterations_only() -> None:
    def state(cursor: int, made: int, stored: list[int], pending: list[int]) -> dict[str, Any]:
        composer = {"buffer": {"groups": stored}}
        own = {"sampler": {"cursor": cursor}, "composer": composer, "pending": pending}
        return own | {"groups_made": made, "rollout_metrics": {}}

    popo = PrioritizedGroupReplay(GroupReplayBuffer())
    two = [state(12, 3, [1, 3], []), state(12, 4, [2], [])]
    assert reshard(two, 2, EpochSampler(), popo) is two
    (one,) = reshard(two, 1, EpochSampler(), popo)
    assert one["sampler"] == {"cursor": 12} and one["composer"]["buffer"]["groups"] == [1, 2, 3]
    assert one["groups_made"] > 3 * 2 + 1, "the second rank's fourth group had the number 3 x 2 + 1"
    three = reshard([one], 3, EpochSampler(), popo)
    assert min(each["groups_made"] * 3 for each in three) >= one["groups_made"]
    with pytest.raises(SettingError, match="inside an iteration"):
        reshard([state(12, 3, [], [1]), state(12, 3, [], [])], 1, EpochSampler(), popo)
    with pytest.raises(SettingError, match="MoPPS"):
        reshard(two, 1, MoPPS(), popo)
    with pytest.raises(SettingError, match="ScorePriority"):
        reshard(two, 1, EpochSampler(), ScorePriority())
