"""Training on an emulated device other than the CPU: mixing tensors of both devices fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.other_device import ELSEWHERE, FromNumbers, Other, OtherDevice, moved
from helpers.tiny_models import fit, slots
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from popo_lightning.callbacks.samples import SampleTable
from popo_lightning.engines.base import EngineContext
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.methods.bapo_balanced import BalancedClip
from popo_lightning.methods.m2po import M2PO
from popo_lightning.methods.ppo_ewma import ProximalAverage
from popo_lightning.methods.rec import REC
from popo_lightning.methods.remix import ScaledWidth
from popo_lightning.methods.sfpo import SlowFastPolicy
from popo_lightning.model.critic import Critic
from popo_lightning.objectives.aggregations import SequenceMean
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import KL
from popo_lightning.objectives.weights import NoCorrection
from popo_lightning.proximal.critic_values import CriticValues


class EngineHere(TransformersEngine):
    """Stays on the CPU, and takes weights from the other device."""

    def start(self, context: EngineContext) -> None:
        super().start(replace(context, device=torch.device("cpu")))


class Watch(L.Callback):
    """Checks that the policy is on the other device. Otherwise the test would test nothing."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        assert {parameter.device for parameter in pl_module.parameters()} == {ELSEWHERE}
        assert all(isinstance(parameter.grad, Other) for parameter in pl_module.model.parameters())


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets the trainer's device for runs inside."""
    monkeypatch.setattr(
        SingleDeviceStrategy, "root_device", property(lambda self: ELSEWHERE, lambda self, device: None)
    )
    monkeypatch.setattr(SingleDeviceStrategy, "model_to_device", lambda self: moved(self.model))
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
    monkeypatch.setattr(L.LightningModule, "device", ELSEWHERE)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: False)  # unknown on meta
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr("popo_lightning.policy.fuse", lambda optimizer: None)  # no fused kernel supports this device
    with OtherDevice(), FromNumbers():
        yield


SETTINGS: dict[str, dict[str, Any]] = {
    "critic": {"model": {"advantage": GAE(), "critic": Critic()}, "callbacks": [CriticValues()]},
    "reference": {"model": slots(Objective(regularizers=[KL(0.1)]))},
    "average": {"proximal": ProximalAverage()},
    "set back": {"callbacks": [SlowFastPolicy()], "ppo_epochs": 2},
    "adaptive": {"model": slots(Objective(NoCorrection(), BalancedClip(center="behave"), aggregation=SequenceMean()))},
    "moments": {"model": slots(Objective(NoCorrection(), M2PO()))},
    "rec": {"model": slots(Objective(NoCorrection(), REC()))},
    "widths": {"model": slots(Objective(trust_region=ScaledWidth()))},
    "lengths": {"model": {"shared_prompts": False}},
}


def test_training_mixes_no_devices(policy: Path, tmp_path: Path, elsewhere: None) -> None:
    """It covers sync, rollouts, evaluation, proximal log-probs, steps and metrics."""
    evaluation = Evaluation(every_n_iterations=1, samples=1, avg_k=1, pass_k=1)
    callbacks = [evaluation, SampleTable(every_n_iterations=1), Watch()]
    run = fit(policy, tmp_path, engine=EngineHere(), iterations=2, callbacks=callbacks)
    assert sum(row.get("train/grad_norm", 0.0) for row in run.rows) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_no_rule_mixes_devices(name: str, policy: Path, tmp_path: Path, elsewhere: None) -> None:
    settings = dict(SETTINGS[name])
    settings["callbacks"] = [*settings.get("callbacks", []), Watch()]
    settings = {"problems_per_iteration": 6, "minibatches": 1, "ppo_epochs": 1} | settings
    run = fit(policy, tmp_path, engine=EngineHere(), iterations=2, **settings)
    assert sum(row.get("train/grad_norm", 0.0) for row in run.rows) > 0
    assert all(row["engine/logp_gap_max"] < 1e-4 for row in run.rows if "engine/logp_gap_max" in row)


def test_a_mixture_is_noticed(elsewhere: None) -> None:
    here, there = torch.ones(3), torch.ones(3).to(ELSEWHERE)
    assert there.device == ELSEWHERE and (there + 1).cpu().tolist() == [2.0] * 3
    with pytest.raises(AssertionError, match="tensors of two devices"):
        there + here
    with pytest.raises(AssertionError, match="tensors of two devices"):
        torch.where(there > 0, there, torch.zeros(3))
    assert (there * torch.tensor(2.0)).tolist() == [2.0] * 3  # as CUDA allows
