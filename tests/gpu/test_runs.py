"""Whole runs on the device: the ratio, resuming, one-rank sharding, and the command as a user gives it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.nodes import fsdp2
from helpers.tiny_models import method, metrics, popo, popo_process

pytestmark = pytest.mark.gpu

Settings = list[str | Path]


@pytest.fixture(autouse=True)
def deterministic_matrix_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets what cuBLAS needs to compute the same sums in every run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def command(config: Path, on_device: Settings) -> Settings:
    return ["fit", "--config", config, *method("popo"), *on_device]


def trained(folder: Path) -> list[dict[str, float]]:
    return [row for row in metrics(folder) if "train/loss" in row]


def test_the_ratio_is_exactly_one_where_nothing_moves(command: Settings, tmp_path: Path) -> None:
    """The learning rate is 0 in bf16-mixed, with proximal log-probs from the pass and three minibatches.

    In groups of two, rewards are often the same, so stored groups replace these groups.
    """
    still = ["--model.optimizer.init_args.lr", "0", "--trainer.precision", "bf16-mixed", "--trainer.max_epochs", "4"]
    still += ["--data.group_size", "2"]
    popo(*command, *still, "--run.folder", tmp_path)
    rows = trained(tmp_path)
    assert len(rows) == 4 and sum(row["replay/groups"] for row in rows) > 0, "nothing was replayed"
    for row in rows:
        assert row["policy/ratio_mean"] == row["policy/ratio_max"] == 1.0
        assert row["train/grad_norm"] > 0


def test_a_resumed_run_is_the_run_that_never_stopped(command: Settings, tmp_path: Path) -> None:
    keep = ["--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "-1"]
    popo(*command, *keep, "--run.folder", tmp_path / "whole", "--trainer.max_epochs", "4")
    popo(*command, *keep, "--run.folder", tmp_path / "parts", "--trainer.max_epochs", "2")
    resume = ["--run.resume", "true", "--trainer.max_epochs", "4"]
    popo(*command, *keep, "--run.folder", tmp_path / "parts", *resume)
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert [row["step"] for row in parts] == [1, 2, 3, 4]
    for there, here in zip(whole, parts, strict=True):
        for name in ("total/responses", "train/tokens", "rollout/response_tokens", "replay/groups"):
            assert here.get(name) == there.get(name), (name, here["step"])
        assert here["train/loss"] == pytest.approx(there["train/loss"], abs=1e-5)
        assert here["train/grad_norm"] == pytest.approx(there["train/grad_norm"], rel=1e-3, abs=1e-5)
    last = [weights_of(tmp_path / name) for name in ("whole", "parts")]
    for name in last[0]:
        torch.testing.assert_close(last[1][name], last[0][name], rtol=1e-4, atol=1e-5)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("iteration-*.ckpt"))
    found: dict[str, torch.Tensor] = torch.load(newest, weights_only=True, map_location="cpu")["state_dict"]
    return found


def test_sharded_over_one_rank_as_on_one_device(command: Settings, tmp_path: Path) -> None:
    """FSDP2 runs in a separate process that popo starts by itself."""
    popo(*command, "--run.folder", tmp_path / "one", "--trainer.max_epochs", "2")
    sharded = [*command, *fsdp2(1, whole_checkpoints=True), "--run.folder", tmp_path / "sharded"]
    finished = popo_process(*sharded, "--trainer.max_epochs", "2")
    assert finished.returncode == 0, finished.stderr[-3000:]
    one, other = trained(tmp_path / "one"), trained(tmp_path / "sharded")
    assert [row["step"] for row in other] == [1, 2]
    for name in ("train/loss", "train/grad_norm", "policy/entropy", "reward/score"):
        assert other[0][name] == pytest.approx(one[0][name], abs=1e-3), name
    # Updates differ in their last bits, so one token may be sampled differently, and the text after it too.
    assert other[1]["policy/entropy"] == pytest.approx(one[1]["policy/entropy"], abs=0.05)


def test_a_run_as_a_user_starts_it(command: Settings, tmp_path: Path) -> None:
    """popo fit and popo validate as processes, on the named device, in bf16-mixed."""
    precision = ["--trainer.precision", "bf16-mixed", "--run.folder", tmp_path]
    finished = popo_process(*command, *precision, "--trainer.max_epochs", "2")
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = trained(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["engine/logp_gap_mean"] < 0.05 for row in rows)
    assert (tmp_path / "summary.json").exists()
