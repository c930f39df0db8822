"""Runs with limits: a limit that does not bind changes nothing, a run resumes exactly, and ranks share multipliers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.nodes import one_node
from helpers.tiny_models import fit, method, metrics, popo

from popo_lightning.replay.composer import OnPolicy
from popo_lightning.rollout.limit_settings import Limit

ITERATIONS = 3
LIMITS = "{length: 5, kl: {bound: 0.001, k: 0}, format_error: {bound: 0.1, start: 0.5}}"
SHORT = ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", "0", "--evaluation.samples", "0"]


def without_limits(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith("limits/")} for row in rows]


def test_a_bound_above_the_cost_is_bitwise_grpo(policy: Path, tmp_path: Path) -> None:
    free = fit(policy, tmp_path / "free", composer=OnPolicy())
    limits = {"length": 9.0, "truncated": Limit(0.9)}
    limited = fit(policy, tmp_path / "limited", composer=OnPolicy(), limits=limits)
    assert [row["limits/length/multiplier"] for row in limited.rows] == [0.0] * ITERATIONS
    lambdas = [row["limits/length/lambda"] for row in limited.rows]
    assert lambdas == sorted(lambdas, reverse=True) and lambdas[-1] < lambdas[0]
    assert without_limits(limited.rows) == free.rows
    assert all(torch.equal(weight, free.weights[name]) for name, weight in limited.weights.items())
    assert limited.rows[0]["limits/length/value"] == pytest.approx(limited.rows[0]["rollout/response_tokens"])


def test_a_limit_that_binds_shortens(policy: Path, tmp_path: Path) -> None:
    """Answers have six or seven tokens."""
    found = fit(policy, tmp_path, composer=OnPolicy(), limits={"length": 4.0}, iterations=6, lr=2e-3)
    first, last = found.rows[0], found.rows[-1]
    assert first["limits/length/violated"] == 1 and first["limits/length/multiplier"] > 1
    assert last["rollout/response_tokens"] < first["rollout/response_tokens"] - 0.5, found.rows


def test_costs_make_groups_effective_from_the_second_iteration_on(policy: Path, tmp_path: Path) -> None:
    """At learning rate 0 the responses equal those of a run without limits."""
    limits = {"length": 4.0}
    free = fit(policy, tmp_path / "free", composer=OnPolicy(), iterations=2, lr=0).rows
    limited = fit(policy, tmp_path / "limited", composer=OnPolicy(), iterations=2, lr=0, limits=limits).rows
    name = "rollout/effective_share"
    assert limited[0][name] == free[0][name] and limited[1][name] > free[1][name]


def test_trains_and_resumes_exactly(config: Path, tmp_path: Path) -> None:
    """The run is stopped within the last iteration and before it. POPO's buffer charges its groups anew."""
    command: list[str | Path] = [
        "fit",
        "--config",
        config,
        *method("popo"),
        "--trainer.max_epochs",
        str(ITERATIONS),
        *SHORT,
    ]
    command += ["--data.limits", LIMITS, "--model.optimizer.init_args.lr", "5e-4", "--checkpoint.save_top_k", "-1"]
    each_step = ["--checkpoint.every_n_epochs", "null", "--checkpoint.every_n_train_steps", "1"]
    each_step += ["--checkpoint.filename", "{step}"]
    whole = tmp_path / "whole"
    popo(*command, *each_step, "--run.folder", whole)
    rows = [row for row in metrics(whole) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["limits/kl/value"] == pytest.approx(0, abs=1e-5), "the policy is its reference"
    assert rows[-1]["limits/kl/value"] > 1e-4
    assert all(row["limits/length/multiplier"] > 0 for row in rows)
    for step in (7, 6):
        resumed = tmp_path / f"resumed{step}"
        shutil.copytree(whole, resumed)
        for path in (resumed / "checkpoints").glob("*.ckpt"):
            if int(path.stem.split("step=")[1]) > step:
                path.unlink()
        popo(*command, *each_step, "--run.folder", resumed, "--run.resume", "true")
        assert metrics(resumed) == metrics(whole)
        left, right = (trained_last(folder) for folder in (resumed, whole))
        assert [weight for weight in right if not torch.equal(left[weight], right[weight])] == []


def trained_last(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "checkpoints").glob("*step=9.ckpt")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_generating_ahead_and_a_critic(config: Path, tmp_path: Path) -> None:
    short = ["--trainer.max_epochs", "2", *SHORT, "--data.limits.length", "1.5"]  # shorter than any policy's answers
    lag = ["--data.engine", "helpers.engines.Apart", "--data.async_level", "1"]
    for name, more in (("popo", lag), ("ppo", list[str]())):
        popo("fit", "--config", config, *method(name), *more, *short, "--run.folder", tmp_path / name)
        rows = [row for row in metrics(tmp_path / name) if "train/loss" in row]
        assert [row["limits/length/violated"] for row in rows] == [1, 1]


def test_an_unknown_cost_is_refused_before_anything_is_sampled(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command: list[str | Path] = ["fit", "--config", config, *method("grpo"), *SHORT, "--data.limits", "{brevity: 5}"]
    with pytest.raises(SystemExit) as stopped:
        popo(*command, "--run.folder", tmp_path)
    assert stopped.value.code == 2
    assert "the cost of data.limits.brevity is 'brevity', which the task does not give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method_name", "setting"),
    [("graft", "composer"), ("bapo_buffer", "composer"), ("dps", "sampler"), ("mopps", "sampler")],
)
def test_an_unknown_part_of_a_rule_is_refused_before_anything_is_sampled(
    method_name: str, setting: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the part would be 0 everywhere, and every group would have failed."""
    misspelt = [f"--data.{setting}.success_key", "accuracy"]
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, *method(method_name), *SHORT, *misspelt, "--run.folder", tmp_path)
    assert stopped.value.code == 2
    assert f"data.{setting}.success_key is 'accuracy', which the task does not give" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_have_the_multipliers_of_one(config: Path, tmp_path: Path) -> None:
    """With learning rate 0 and responses that depend only on the problem, only the rank of each cost differs."""
    same = ["--data.engine", "helpers.tiny_models.EngineByProblem", "--model.optimizer.init_args.lr", "0"]
    command: list[str | Path] = ["fit", "--config", config, *method("grpo"), *same, *SHORT, "--data.limits", LIMITS]
    command += ["--trainer.max_epochs", "3", "--data.problems_per_iteration", "8", "--data.minibatches", "2"]
    found = []
    for ranks in (1, 2):
        strategy = ["--trainer.strategy", "ddp"] if ranks > 1 else []
        one_node(ranks, *command, *strategy, "--run.folder", tmp_path / str(ranks), seconds=150)
        rows = [row for row in metrics(tmp_path / str(ranks)) if "train/loss" in row]
        found.append([{name: row[name] for name in row if name.startswith("limits/")} for row in rows])
    exact = [[{n: v for n, v in row.items() if "/kl/" not in n} for row in rows] for rows in found]
    assert exact[0] == exact[1] and len(exact[0]) == 3
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, abs=1e-6), "log-probs are rounded with the shape of a batch"
