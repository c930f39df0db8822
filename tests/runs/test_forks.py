"""A run that begins from another run's checkpoint counts its own responses, seconds and evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import method, metrics, popo

Args = list[str | Path]
AN_ITERATION = 9 * 4  # number of responses


@pytest.fixture(scope="module")
def base(config: Path) -> Args:
    """Returns a command with evaluations every two iterations."""
    return ["fit", "--config", config, "--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "-1"]


@pytest.fixture(scope="module")
def first(base: Args, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    popo(*base, *method("popo"), "--trainer.max_epochs", "3", "--run.folder", folder)
    assert summary(folder)["replay_share"] > 0 and summary(folder)["began_from"] is None
    return folder


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.parametrize(("iteration", "evaluated"), [(3, [4, 5]), (2, [2, 4, 5])])
def test_a_fork_counts_its_own(
    base: Args, first: Path, tmp_path: Path, iteration: int, evaluated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """This also holds after it is resumed. Its first evaluation is that of the weights it begins with."""
    (begun,) = (first / "checkpoints").glob(f"iteration-{iteration:04d}.ckpt")
    fork = [*base, *method("grpo"), "--ckpt_path", begun, "--run.folder", tmp_path, "--run.resume", "true"]
    popo(*fork, "--trainer.max_epochs", "4")
    popo(*fork, "--trainer.max_epochs", "5")
    found, own = summary(tmp_path), 5 - iteration
    assert found["began_from"] == {"checkpoint": str(begun), "iterations": iteration}
    assert found["iterations"] == 5 and found["responses"] == own * AN_ITERATION and found["replay_share"] == 0
    assert [entry["iteration"] for entry in found["evaluations"]] == evaluated
    rows = [row for row in metrics(tmp_path) if "total/responses" in row]
    assert [row["total/responses"] for row in rows] == [AN_ITERATION * (n + 1) for n in range(own)]
    shares = [row["rollout/effective_share"] for row in rows]
    assert found["effective_share"] == pytest.approx(sum(shares) / own)
    assert found["response_tokens"] == rows[-1]["total/tokens"]
    assert found["first_evaluation"]["iteration"] == evaluated[0]
    assert f"after iterations {evaluated[0]} and 5" in capsys.readouterr().err
    eval_seconds = [
        v for e in found["evaluations"] for k, v in e.items() if k.endswith("/seconds") and e["iteration"] > 3
    ]
    assert found["seconds"]["evaluation"] == pytest.approx(sum(eval_seconds), abs=2e-3)
    assert found["wall_seconds"] >= found["seconds"]["iteration"]
