"""The order in which weights and key-value cache sleep and wake on a GPU, in WeightSync, tested without a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from helpers import vllm as vllm_for_tests
from helpers.vllm import Recorder
from torch import Tensor

from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import EngineContext, Sampling
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.model.prompts import Prompt
from popo_lightning.rollout.weight_sync import WeightSync

llm = vllm_for_tests.llm


class Policy:
    """A policy with one weight, whose value is the version."""

    def __init__(self, llm: Recorder, monkeypatch: pytest.MonkeyPatch, every: int = 1, **settings: Any) -> None:
        monkeypatch.setattr("popo_lightning.engines.vllm.engine.end_token_ids", lambda folder, tokenizer: [1])
        self.llm = llm
        self.weight = 0.0
        self.engine = VLLMEngine(**settings)
        context = EngineContext("no folder", torch.device("cuda", 0), torch.float32, 0, 1, 64)
        self.weight_sync = WeightSync(
            self.engine,
            every,
            PhaseClock(),
            context=lambda: context,
            policy=lambda: cast(PolicyModel, self),
            idle=lambda: None,
        )

    def named_weights(self) -> list[tuple[str, Tensor]]:
        return [("weight", torch.tensor(self.weight))]

    def kept_weights(self) -> dict[str, Tensor]:
        return dict(self.named_weights())

    def weights_kept(self, kept: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        return kept.items()

    def trained_bits(self) -> None:
        return None

    def generate(self, count: int = 1) -> None:
        stream = self.engine.stream([Prompt(torch.tensor([2]))] * count, 2, Sampling(4), seed=1)
        assert list(stream) == []

    def rollouts(self, version: int) -> list[str]:
        """Runs an iteration and returns the calls of vLLM in it."""
        self.llm.calls.clear()
        self.weight = float(version)
        self.weight_sync.for_rollouts(version, version)
        self.generate()
        self.engine.sleep()
        return list(self.llm.calls)

    def evaluation(self, version: int) -> list[str]:
        self.llm.calls.clear()
        self.weight = float(version)
        self.weight_sync.newest(version, version)
        self.generate()
        return list(self.llm.calls)


WAKE_WEIGHTS = ["empty cache", "wake weights"]
WAKE_CACHE = ["empty cache", "wake kv_cache"]


def test_weights_wake_for_the_sync_and_the_cache_for_generation(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(llm, monkeypatch)
    assert policy.rollouts(0)[1:] == ["reload 0", "generate", "sleep 2"]  # after "device 3" of the start
    assert not policy.engine.holds_weights
    for version in (1, 2):
        told = policy.rollouts(version)
        assert told == [*WAKE_WEIGHTS, f"reload {version}", *WAKE_CACHE, "generate", "sleep 2"]


def test_unchanged_weights_come_back_after_a_deep_sleep(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Level 2 keeps nothing, so even unchanged weights must be synced again. Level 1 needs no sync."""
    deep, light = Policy(llm, monkeypatch), Policy(llm, monkeypatch, sleep_level=1)
    for policy, expected in ((deep, ["reload 1"]), (light, [])):
        policy.rollouts(1)
        assert policy.rollouts(1)[:-1] == [*WAKE_WEIGHTS, *expected, *WAKE_CACHE, "generate"]


def test_two_evaluations_in_a_row(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(llm, monkeypatch)
    policy.rollouts(0)
    assert policy.evaluation(1) == [*WAKE_WEIGHTS, "reload 1", *WAKE_CACHE, "generate"]
    assert policy.evaluation(1) == ["generate"]
    assert policy.rollouts(1) == ["generate", "sleep 2"]
    policy.engine.sleep()
    assert policy.llm.calls == ["generate", "sleep 2"]  # asleep already


def test_delayed_weights(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(llm, monkeypatch, every=2)
    told = [policy.rollouts(version) for version in range(4)]
    assert [next(call for call in calls if "reload" in call) for calls in told] == [f"reload {v}" for v in (0, 0, 2, 2)]
    assert policy.evaluation(4)[2] == "reload 4"
    assert policy.engine.version == 4
    assert policy.rollouts(5)[0] == "reload 5"  # the weights of version 2 are two versions old


def test_a_sync_without_generation_leaves_the_cache_asleep(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(llm, monkeypatch)
    policy.rollouts(0)
    llm.calls.clear()
    policy.weight_sync.newest(1, 1)
    policy.engine.sleep()
    policy.generate()  # the engine wakes by itself, so it does not answer from released memory
    assert llm.calls == [*WAKE_WEIGHTS, "reload 0", "sleep 2", *WAKE_WEIGHTS, *WAKE_CACHE, "generate"]


def test_nothing_sleeps_on_a_cpu(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.engines.vllm.engine.end_token_ids", lambda folder, tokenizer: [1])
    engine = vllm_for_tests.started("cpu", sleep_level=2)
    engine.sleep()
    engine.wake()
    assert llm.calls == [] and engine.holds_weights


def test_every_prompt_has_a_seed_of_its_own(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a prompt's responses has its own seed too: vLLM counts up from the prompt's seed, within its integers."""
    policy = Policy(llm, monkeypatch)
    policy.weight_sync.newest(0, 0)
    policy.generate(100)
    assert len(set(llm.seeds)) == 100
    assert all(0 <= seed < 2**63 - 2**20 for seed in llm.seeds)


def test_the_peak_does_not_count_what_sleeps(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts the pages that a sleeping vLLM has released, as if generation and training needed them at once."""
    policy = Policy(llm, monkeypatch)
    device = torch.device("cuda", 0)
    policy.weight_sync.newest(0, 0)
    llm.takes("weights", 30, 32)
    llm.takes("kv_cache", 100, 100)
    llm.trains_with(20, kept=True)
    policy.generate()
    policy.engine.sleep()
    llm.trains_with(60)
    assert policy.engine.take_peak_bytes(device) == 150, "awake: 30 + 100 + 20"
    llm.trains_with(200)
    assert policy.engine.take_peak_bytes(device) == 220, "a step after a checkpoint: nothing of the engine"
    llm.trains_with(90)
    policy.weight_sync.newest(1, 1)  # wakes the weights
    llm.trains_with(140)
    assert policy.engine.take_peak_bytes(device) == 190, "the weights, 20 and 140"
    policy.generate()
    policy.engine.sleep()
    assert policy.engine.take_peak_bytes(device) == 150
    assert policy.engine.take_peak_bytes(device) == 20


def test_an_engine_that_never_sleeps_counts_all(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(llm, monkeypatch, sleep_level=0)
    policy.weight_sync.newest(0, 0)
    engine = policy.engine
    llm.takes("weights", 30, 32)
    engine.sleep()
    llm.trains_with(50)
    assert engine.take_peak_bytes(torch.device("cuda", 3)) == 80
