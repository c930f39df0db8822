"""Warnings about runs whose metrics leave the range of healthy training."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import method, popo

from popo_lightning.callbacks.health import MAX_SAID, RECOVERED, WINDOW, Health
from popo_lightning.core.errors import SettingError

WELL = {
    "weight/replayed_ess": 0.97,
    "weight/replayed_max": 3.0,
    "policy/entropy": 1.0,
    "replay/share": 0.6,
    "rollout/effective_share": 0.4,
    "rollout/all_wrong_share": 0.3,
    "rollout/truncated_frac": 0.02,
}
ILL = {
    "weight/replayed_ess": (0.03, "min_replayed_ess", "buffer.max_uses"),
    "weight/replayed_max": (25_000.0, "max_weight", "buffer.max_age"),
    "policy/entropy": (0.04, "min_entropy", "EntropyBonus"),
    "replay/share": (0.95, "max_replayed", "buffer.max_uses"),
    "rollout/effective_share": (0.0, "min_effective_share", "data.group_size"),
    "rollout/truncated_frac": (0.95, "max_truncated", "data.stop"),
}


class Watch:
    """Feeds Health with the metrics of successive iterations, with one optimizer step in each unless told otherwise."""

    def __init__(self, **settings: Any) -> None:
        self.health, self.steps = Health(**settings), 0.0

    def see(self, iterations: int, steps: int = 1, **changed: float) -> list[str]:
        said = []
        for _ in range(iterations):
            self.steps += steps
            names = {name: changed.get(name.replace("/", "_"), value) for name, value in WELL.items()}
            said += self.health.statements(names | {"train/optimizer_steps": self.steps})
        return said


def test_nothing_is_said_of_a_healthy_run() -> None:
    assert Watch().see(50) == []


@pytest.mark.parametrize("name", ILL)
def test_each_kind_is_said_once_with_its_setting_and_remedy(name: str) -> None:
    value, setting, remedy = ILL[name]
    ill = {name.replace("/", "_"): value}
    watch = Watch()
    assert watch.see(WINDOW) == []
    said = watch.see(2, **ill)
    assert said == []
    said += watch.see(40, **ill)
    assert len(said) == 1
    assert name in said[0] and f"health.{setting}" in said[0] and remedy in said[0]
    assert Watch(**{setting: None}).see(40, **ill) == []


def test_three_iterations_without_a_step() -> None:
    watch = Watch()
    assert watch.see(2, steps=0) == [] and watch.see(1) == []  # two iterations, then one
    assert watch.see(2, steps=0) == []
    (said,) = watch.see(20, steps=0)
    assert "no optimizer step in 3 iterations" in said and "samples.jsonl" in said
    (said,) = Watch(patience=1).see(1, steps=0)  # the very first iteration
    assert "no optimizer step in 1 iterations" in said


def test_too_hard_too_easy_and_broken_are_told_apart() -> None:
    (hard,) = Watch().see(20, rollout_effective_share=0.0, rollout_all_wrong_share=0.9)
    (easy,) = Watch().see(20, rollout_effective_share=0.0, rollout_all_wrong_share=0.0)
    fallen = Watch()
    fallen.see(WINDOW)
    (breaking,) = fallen.see(20, rollout_effective_share=0.0, rollout_all_wrong_share=0.9)
    assert "too hard" in hard and "too easy" in easy
    assert "0.4 at the start" in breaking and "the policy is breaking; lower the learning rate" in breaking
    assert not Watch().see(WINDOW - 1, rollout_effective_share=0.0)  # too few iterations to tell
    alternating = Watch()
    for _ in range(20):  # with five groups, all can be ineffective every other iteration by chance
        assert not alternating.see(1, rollout_effective_share=0.0) + alternating.see(1, rollout_effective_share=0.2)


def test_said_again_after_recovery_and_three_times_at_most() -> None:
    watch = Watch()
    for _ in range(MAX_SAID):
        assert len(watch.see(5, weight_replayed_ess=0.1)) == 1
        assert watch.see(RECOVERED - 1) == watch.see(5, weight_replayed_ess=0.1) == []  # not yet recovered
        watch.see(RECOVERED)
    assert watch.see(5, weight_replayed_ess=0.1) == []


def test_what_is_not_logged_is_not_judged() -> None:
    """Without replay, fresh groups or a step, metrics are missing."""
    health = Health()
    for _ in range(20):
        assert health.statements({}) == []


def test_a_resumed_run_does_not_repeat_itself() -> None:
    first = Watch()
    first.see(WINDOW)
    assert len(first.see(3, policy_entropy=0.05, weight_replayed_ess=0.1)) == 2
    resumed = Watch()
    state = torch.utils._pytree.tree_map(lambda leaf: leaf, first.health.state_dict())
    resumed.health.load_state_dict(state)
    resumed.steps = first.steps
    assert resumed.see(9, policy_entropy=0.05, weight_replayed_ess=0.1) == []
    assert len(resumed.see(9, policy_entropy=0.05, rollout_truncated_frac=0.9)) == 1


def test_rank_0_speaks_alone(caplog: pytest.LogCaptureFixture) -> None:
    for rank in (1, 0):
        trainer: Any = SimpleNamespace(is_global_zero=rank == 0, datamodule=SimpleNamespace(iteration=7))
        module = SimpleNamespace(iteration_metrics=WELL | {"weight/replayed_ess": 0.1})
        with caplog.at_level(logging.WARNING):
            Health(patience=1).on_train_epoch_end(trainer, module)
        assert len(caplog.records) == (rank == 0)
    assert caplog.text.count("iteration 7: weight/replayed_ess is 0.1, below 0.5") == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_replayed_ess": 0.0}, "health.min_replayed_ess is 0"),
        ({"min_entropy": 1.0}, "health.min_entropy is 1"),
        ({"max_weight": 1.0}, "health.max_weight is 1"),
        ({"patience": 0}, "health.patience is 0"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        Health(**settings)


@pytest.mark.slow
def test_a_run_that_collapses_says_so(config: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Tests the command line: thresholds as settings, the log, the table of samples, and resuming."""
    command = ["fit", "--config", config, *method("popo"), "--run.folder", tmp_path, "--trainer.max_epochs", "4"]
    command += ["--model.optimizer.lr", "0.05", "--health.patience", "1", "--checkpoint.every_n_epochs", "2"]
    command += [
        "--evaluation.every_n_iterations",
        "0",
        "--evaluation.at_start",
        "false",
        "--health.min_entropy",
        "0.9",
    ]
    with caplog.at_level(logging.WARNING):
        popo(*command)
    said = [record.getMessage() for record in caplog.records if record.name.endswith("health")]
    assert said and all("iteration " in sentence and "health." in sentence for sentence in said)
    assert len({sentence.partition("(health.")[2] for sentence in said}) == len(said)  # one of each kind
    popo(*command, "--run.resume", "true", "--trainer.max_epochs", "5")
