"""Whose log-probs are stored as behave: the trainer's have none of the engine's noise, and nothing else changes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.engines import Apart, Recording
from helpers.groups import group, response
from helpers.tiny_models import Run, fit, method, metrics, popo, tiny_task
from torch import Tensor

from popo_lightning.cli.combinations import check_combination
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.base import RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.methods.ppo_ewma import ProximalAverage
from popo_lightning.objectives.weights import TruncatedIS
from popo_lightning.policy import PolicyModule
from popo_lightning.proximal.snapshot import ProximalSnapshot
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.rollout.iteration import scored_by_trainer
from popo_lightning.rollout.report import RolloutReport, of_all_ranks, rollout_metrics

NOISE = 1e-3


class Noisy(TransformersEngine):
    """Samples as its base class does, but records log-probs that are too low by a constant."""

    stream = RolloutEngine.stream  # all at once, by generate
    checked = False

    def __init__(self, noise: float = NOISE) -> None:
        super().__init__()
        self.noise = noise

    def generate(self, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        return [
            [replace(one, behave_logp=one.behave_logp - self.noise) for one in of_prompt]
            for of_prompt in super().generate(prompts, n, sampling, seed)
        ]


def trained(policy: Path, folder: Path, engine: RolloutEngine, **settings: Any) -> Run:
    return fit(policy, folder, engine=engine, iterations=3, **settings)


def test_scored_by_trainer_by_hand() -> None:
    # The engine differs by 0.5, 0.25 and 0.
    sampled = replace(group(7), responses=[response([1, 2], [-1.0, -2.0], 1.0), response([3], [-3.0])])
    own = [torch.tensor([-1.5, -1.75]), torch.tensor([-3.0])]
    (scored,), counts = scored_by_trainer([sampled], [own])
    assert all(map(torch.equal, (one.behave_logp for one in scored.responses), own))
    assert (scored.id, [one.parts for one in scored.responses]) == (7, [one.parts for one in sampled.responses])
    assert counts == {"gap_tokens": 3, "gap": 0.75, "gap_max": 0.5}
    assert scored_by_trainer([], []) == ([], {"gap_tokens": 0, "gap": 0.0, "gap_max": 0.0})


def test_gaps_of_calls_and_ranks_add_up() -> None:
    report = RolloutReport(0, "score")
    report.sampled([group(0)])
    assert not any(name.startswith("gap") for name in report.counts())
    report.compared({"gap_tokens": 3, "gap": 0.75, "gap_max": 0.5})
    report.compared({"gap_tokens": 1, "gap": 0.25, "gap_max": 0.25})
    counts = of_all_ranks([report.counts(), report.counts() | {"gap_max": 2.0, "gap": 3.0, "gap_tokens": 6}])
    found = rollout_metrics(counts)
    assert found["engine/logp_gap_mean"] == pytest.approx(0.4) and found["engine/logp_gap_max"] == 2.0


def test_weights_are_free_of_the_engines_noise(policy: Path, tmp_path: Path) -> None:
    exact = trained(policy, tmp_path / "exact", Noisy(0.0), behave="trainer")
    noisy = trained(policy, tmp_path / "noisy", Noisy(), behave="trainer")
    assert all(torch.equal(noisy.weights[name], exact.weights[name]) for name in exact.weights)
    # The alarm for an engine with other weights still measures the engine, over all samples.
    for quiet, loud in zip(exact.rows, noisy.rows, strict=True):
        assert loud["engine/logp_gap_mean"] == pytest.approx(NOISE, rel=0.05)
        assert quiet["engine/logp_gap_mean"] < NOISE / 50
        assert loud["weight/fresh_mean"] == pytest.approx(1, abs=1e-5)
    # With the engine's log-probs, a replayed weight contains the noise.
    engines = trained(policy, tmp_path / "engine", Noisy(), behave="engine")
    assert not all(torch.equal(engines.weights[name], exact.weights[name]) for name in exact.weights)
    assert engines.rows[0]["weight/fresh_mean"] == pytest.approx(1 + NOISE, rel=1e-4)


def test_by_default_nothing_is_scored(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.rollout.iteration.scored_by_trainer", None)
    engine = Recording()
    run = fit(policy, tmp_path, engine=engine, iterations=1)
    recorded = [one.behave_logp for _, groups in engine.calls.values() for each in groups for one in each]
    composer: Any = run.data.composer
    kept = [one for each in composer.buffer.usable(1) for one in each.responses]
    assert kept and all(any(torch.equal(one.behave_logp, logp) for logp in recorded) for one in kept)


def test_stored_groups_have_the_policys_log_probs(policy: Path, tmp_path: Path) -> None:
    """They are those of the version that sampled the groups, even if the buffer keeps the groups longer."""

    found: dict[int, list[Tensor]] = {}

    class Start(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            for each in trainer.datamodule.composer.buffer.usable(batch.version, 0):  # type: ignore[attr-defined]
                if batch.index == 0 and each.version == batch.version:
                    found[each.id] = pl_module.logprobs(Minibatch([each], batch.version, 0))

    composer = PrioritizedGroupReplay(GroupReplayBuffer(32))
    trained(policy, tmp_path, Noisy(), behave="trainer", callbacks=[Start()], composer=composer)
    kept = composer.buffer.usable(3)
    assert len(kept) > 5 and len({each.version for each in kept}) > 1
    for each in kept:
        for one, own in zip(each.responses, found[each.id], strict=True):
            torch.testing.assert_close(one.behave_logp, own, atol=2e-6, rtol=0)


def test_prox_may_be_what_is_kept(policy: Path, tmp_path: Path) -> None:
    """A fresh row is then scored once per iteration, and prox is still the policy's own."""
    proximal = ProximalSnapshot(recompute_fresh=False)
    run = trained(policy, tmp_path / "kept", Noisy(), behave="trainer", proximal=proximal)
    again = trained(policy, tmp_path / "again", Noisy(), behave="trainer")
    first, anew = run.rows[0], again.rows[0]
    # With the engine's log-probs the mean ratio would be off by the noise, which is a hundred times as much.
    assert first["policy/ratio_mean"] == pytest.approx(anew["policy/ratio_mean"], abs=NOISE / 100)


def test_an_engine_with_other_weights_still_stops_the_run(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"engine and policy disagree by 0.1 nats"):
        trained(policy, tmp_path, Noisy(0.1), behave="trainer")


def test_a_run_resumes_exactly(config: Path, tmp_path: Path) -> None:
    command = ["fit", "--config", config, *method("popo"), "--data.behave", "trainer", "--trainer.max_epochs", 3]
    command += ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", 0, "--evaluation.samples", 0]
    command += ["--checkpoint.every_n_epochs", 1, "--checkpoint.save_top_k", -1]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    popo(*map(str, command), "--run.folder", whole)
    rows = metrics(whole)
    assert all(0 < row["engine/logp_gap_mean"] < 1e-4 for row in rows if "train/loss" in row)
    shutil.copytree(whole, resumed)
    (resumed / "checkpoints" / "iteration-0003.ckpt").unlink()
    popo(*map(str, command), "--run.folder", resumed, "--run.resume", "true")
    assert metrics(resumed) == rows
    left, right = (
        torch.load(folder / "checkpoints" / "iteration-0003.ckpt", weights_only=True)["state_dict"]
        for folder in (resumed, whole)
    )
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"async_level": 1}, "data.async_level is 1, whose responses older weights sample; set data.async_level to 0"),
        ({"weight_sync_interval": 2}, "data.weight_sync_interval is 2, whose responses older weights sample; set"),
        ({"temperature_spread": 0.2}, "data.temperature_spread is 0.2, whose responses have temperatures of their own"),
    ],
)
def test_what_the_trainer_cannot_know_is_refused(settings: dict[str, Any], sentence: str) -> None:
    RolloutDataModule(tiny_task(), Apart(), behave="engine", **settings)
    with pytest.raises(SettingError, match=r"^data.behave is trainer, the policy's own log-probs at ") as caught:
        RolloutDataModule(tiny_task(), Apart(), behave="trainer", **settings)
    assert sentence in str(caught.value)
    with pytest.raises(SettingError, match=r"^data.behave is 'prox'; it must be engine or trainer"):
        RolloutDataModule(tiny_task(), Apart(), behave="prox")  # type: ignore[arg-type]


def test_a_temperature_of_the_run_is_no_obstacle(policy: Path, tmp_path: Path) -> None:
    """The trainer scores at the temperature at which the engine samples."""
    run = trained(policy, tmp_path, TransformersEngine(), behave="trainer", temperature=0.7, model={"temperature": 0.7})
    assert all(row["engine/logp_gap_mean"] < 1e-4 for row in run.rows)


@pytest.mark.parametrize("moves", [False, True])
def test_a_weight_for_the_engines_noise_is_refused(moves: bool) -> None:
    """It is allowed if prox has moved since, because the weight then differs."""
    module = PolicyModule(path="none", behave_weight=TruncatedIS(correct_fresh=True))
    data = RolloutDataModule(tiny_task(), TransformersEngine(), behave="trainer")
    if moves:
        check_combination(module, data, [ProximalAverage(2.0)])
        return
    with pytest.raises(SettingError, match=r"^data.behave is trainer, .*is TruncatedIS with correct_fresh true"):
        check_combination(module, data, [ProximalSnapshot()])
    check_combination(module, RolloutDataModule(tiny_task(), TransformersEngine()), [ProximalSnapshot()])
