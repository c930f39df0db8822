"""Runs with a temperature for each response: what is recorded and compared. A spread of 0 is a run without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import method, metrics, popo

from popo_lightning.core.errors import SettingError
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.base import Sampling, asks, prompt_seeds
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.toys.countdown import CountdownSteps


def test_temperatures_are_uniform_and_follow_from_the_seed() -> None:
    sampling = Sampling(1, 0.8, temperature_spread=0.2)
    seeds = [seed + i for seed in prompt_seeds(5, 1000) for i in range(4)]
    found = torch.tensor([sampling.temperature_of(seed) for seed in seeds])
    assert float(found.min()) >= 0.6 and float(found.max()) <= 1.0
    # The mean and quartiles of 4000 numbers have standard errors below 0.003.
    assert float(found.mean()) == pytest.approx(0.8, abs=0.006)
    assert float(found.quantile(0.25)) == pytest.approx(0.7, abs=0.008)
    assert found.tolist() == torch.tensor([sampling.temperature_of(seed) for seed in seeds]).tolist()
    assert Sampling(1, 0.8).temperature_of(seeds[0]) is None


def test_an_engine_that_knows_one_temperature_is_refused() -> None:
    class Plain(TransformersEngine):
        spreads_temperature = False

    RolloutDataModule(CountdownSteps(), Plain())
    RolloutDataModule(CountdownSteps(), TransformersEngine(), temperature_spread=0.2)
    with pytest.raises(SettingError, match=r"^data.temperature_spread is 0.2, but data.engine is Plain, which samples"):
        RolloutDataModule(CountdownSteps(), Plain(), temperature_spread=0.2)
    with pytest.raises(
        SettingError, match=r"^data.temperature_spread is 0.6; use 0 for none, .*data.temperature \(0.6\)"
    ):
        RolloutDataModule(CountdownSteps(), TransformersEngine(), temperature=0.6, temperature_spread=0.6)


def test_requests() -> None:
    first, second = prompt_seeds(5, 2)
    whole = asks(2, 3, Sampling(1, 0.7), 5)
    assert [(one.place, one.n, one.seed, one.temperature) for one in whole] == [(0, 3, first, 0.7), (1, 3, second, 0.7)]
    each = asks(2, 3, Sampling(1, 0.7, temperature_spread=0.1), 5)
    assert [(one.place, one.n, one.seed) for one in each] == [
        *((0, 1, first + i) for i in range(3)),
        *((1, 1, second + i) for i in range(3)),
    ]


def fit(config: Path, folder: Path, name: str, *settings: Any) -> dict[str, torch.Tensor]:
    """Returns the weights after two iterations."""
    command = ["fit", "--config", config, *method(name), "--trainer.max_epochs", 2, "--run.folder", folder]
    command += ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", 0, "--evaluation.samples", 0]
    popo(*map(str, [*command, "--model.optimizer.init_args.lr", 5e-4, *settings]))
    (path,) = (folder / "checkpoints").glob("iteration-0002.ckpt")
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def test_a_run_records_temperatures_and_compares_the_engine_at_the_base(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path / "run", "grpo_spread", "--data.temperature_spread", 0.4)
    rows = [row for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert len(rows) == 2 and not any("engine/logp_gap_mean" in row for row in rows)
    # The weight's mean over behave's samples is 1. Its spread comes from the temperatures, not from rounding.
    assert all(row["weight/fresh_mean"] == pytest.approx(1, abs=0.1) for row in rows)
    assert all(row["weight/fresh_ess"] < 0.999 for row in rows)
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    drawn = [line["temperature"] for line in lines]
    assert len(set(drawn)) > len(drawn) / 2 and all(0.6 <= one <= 1.4 for one in drawn)


def test_a_spread_of_zero_is_the_run_without_one(config: Path, tmp_path: Path) -> None:
    corrected = ["--model.behave_weight", "TruncatedIS", "--model.behave_weight.correct_fresh", "true"]
    plain = fit(config, tmp_path / "plain", "grpo", *corrected)
    off = fit(config, tmp_path / "off", "grpo_spread", "--data.temperature_spread", 0)
    on = fit(config, tmp_path / "on", "grpo_spread")
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    usual = fit(config, tmp_path / "usual", "grpo")
    none = fit(config, tmp_path / "none", "grpo", "--data.temperature_spread", 0)
    assert all(torch.equal(usual[name], none[name]) for name in usual)
    assert not all(torch.equal(plain[name], on[name]) for name in plain)
    ignored = ("time/", "throughput/", "memory/")
    left, right = (
        [
            {name: value for name, value in row.items() if not name.startswith(ignored)}
            for row in metrics(tmp_path / run)
        ]
        for run in ("plain", "off")
    )
    assert left == right and any("engine/logp_gap_mean" in row for row in left)
