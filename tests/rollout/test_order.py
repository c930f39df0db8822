"""The order of events: rollouts never use old weights or come too early, and log-probs come from the right weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.tiny_models import Run, fit, popo
from objectives.test_identities import one_response
from torch import Tensor

from popo_lightning.core.groups import Group, Response
from popo_lightning.engines.base import NamedTensors, RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.replay.composer import Composer, Filter, Iteration

Event = tuple[Any, ...]


def digest(model: torch.nn.Module) -> str:
    content = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        content.update(name.encode() + parameter.detach().numpy().tobytes())
    return content.hexdigest()[:12]


class WatchedEngine(TransformersEngine):
    """Records the weights that really generate, and keeps copies of its results."""

    checked = False
    stream = RolloutEngine.stream  # calls generate

    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self.events = events
        self.returned: dict[tuple[int, ...], list[Tensor]] = {}

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        super().update_weights(weights, version)
        self.events.append(("update", version, digest(self._model)))

    def generate(self, prompts: Sequence[Tensor], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        self.events.append(("generate", self.version, digest(self._model)))
        sampled = super().generate(prompts, n, sampling, seed)
        for response in (r for responses in sampled for r in responses):
            self.returned.setdefault(tuple(response.token_ids.tolist()), []).append(response.behave_logp.clone())
        return sampled


class WatchedTraining(L.Callback):
    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.groups: list[tuple[int, Group]] = []  # (version of the iteration, group)
        self.start_model: Any = None
        self.worst_prox = self.moved = 0.0
        self.prox_tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.events.append(("start", digest(pl_module.model)))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert batch.index == batch_idx
        if batch.index == 0:
            self.start_model = copy.deepcopy(pl_module.model)
        self.groups += [(batch.version, group) for group in batch.groups]
        if "prox_logp" not in batch.recorded:
            return
        for row, prox in zip(batch.rows(), batch.recorded["prox_logp"], strict=True):
            with torch.no_grad():
                expected = one_response(self.start_model, row.prompt_ids, row.response.token_ids)
                present = one_response(pl_module.model, row.prompt_ids, row.response.token_ids)
            self.worst_prox = max(self.worst_prox, float((expected - prox).abs().max()))
            self.moved = max(self.moved, float((present - prox).abs().max()))
            self.prox_tokens += len(prox)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.events.append(("step", batch.version, batch.index, outputs["stepped"], digest(pl_module.model)))


@pytest.fixture(scope="module")
def watched(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Event], Any, Any]:
    events: list[Event] = []
    engine, training = WatchedEngine(events), WatchedTraining(events)
    # Comes before the first callback that generates, as Lightning calls hooks in this order.
    evaluation = Evaluation(every_n_iterations=2, samples=2, avg_k=2, pass_k=2)
    folder = tmp_path_factory.mktemp("order")
    run = fit(policy, folder, engine=engine, callbacks=[training, evaluation], iterations=4, minibatches=3, lr=1e-3)
    return run, events, engine, training


def test_rollouts_come_from_the_newest_weights(watched: tuple[Run, list[Event], Any, Any]) -> None:
    _, events, _, _ = watched
    assert events[0][0] == "start"  # before training begins, nothing is generated and no weights are sent
    weights, seen = events[0][1], {events[0][1]}
    for event in events[1:]:
        if event[0] == "step":
            assert event[-1] not in seen, "a step that changes nothing would prove nothing"
            weights = event[-1]
            seen.add(weights)
        else:
            assert event[-1] == weights, event
    assert len(seen) == 1 + 4 * 3


def test_one_rollout_then_all_its_minibatches(watched: tuple[Run, list[Event], Any, Any]) -> None:
    _, events, _, _ = watched
    iterations = [e[:3] if e[0] == "step" else e[:2] for e in events if e[0] in ("generate", "step")]
    evaluation = [("generate", 0), ("generate", 0)]  # greedy and sampled
    expected: list[Event] = list(evaluation)
    for version in range(4):
        expected += [("generate", version), *(("step", version, index) for index in range(3))]
        if version % 2 == 1:
            expected += [("generate", version + 1), ("generate", version + 1)]
    assert iterations == expected


def test_groups_carry_their_version(watched: tuple[Run, list[Event], Any, Any]) -> None:
    run, events, _, training = watched
    first_trained: dict[int, int] = {}
    for version, group in training.groups:
        first_trained.setdefault(group.id, version)
        assert group.version == first_trained[group.id] <= version
    assert any(group.version < version for version, group in training.groups)
    ages = [row["replay/age_max"] for row in run.rows if row.get("replay/groups")]
    assert ages and min(ages) >= 1
    updates = {version: weights for kind, version, weights in (e for e in events if e[0] == "update")}
    assert sorted(updates) == [0, 1, 2, 3, 4]


def test_proximal_and_behavior_log_probs(watched: tuple[Run, list[Event], Any, Any]) -> None:
    _, _, engine, training = watched
    assert training.prox_tokens > 200
    assert training.worst_prox < 1e-5  # weights at the iteration's start, for any later steps
    assert training.moved > 0.01
    for _, group in training.groups:
        for response in group.responses:  # bit for bit as recorded when sampled, replayed or not
            recorded = engine.returned[tuple(response.token_ids.tolist())]
            assert any(torch.equal(response.behave_logp, logp) for logp in recorded)


class KeepAtMost(Composer):
    """Keeps fewer groups each time: 2, then 1, then none."""

    def compose(self, iteration: Iteration) -> list[Group]:
        return iteration.split(iteration.rollout())[0][: max(0, 2 - iteration.version)]


def test_minibatches_are_constant_and_empty_ones_are_skipped(policy: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    training = WatchedTraining(events)
    run = fit(policy, tmp_path, composer=KeepAtMost(), callbacks=[training], iterations=3, minibatches=3, lr=3e-3)
    steps = [event for event in events if event[0] == "step"]
    assert [event[1:3] for event in steps] == [(version, index) for version in range(3) for index in range(3)]
    assert [event[3] for event in steps] == [True, True, False, True, False, False, False, False, False]
    for before, after in pairwise(steps):
        assert (before[-1] != after[-1]) == after[3]
    assert run.trainer.global_step == 3
    assert run.data.iteration == 3
    assert [row["replay/trained_groups"] for row in run.rows] == [2, 1, 0]
    assert [row["train/optimizer_steps"] for row in run.rows] == [2, 3, 3]


def test_filter_with_few_effective_groups(policy: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    settings: dict[str, Any] = {"problems_per_iteration": 4, "group_size": 2, "minibatches": 4}
    run = fit(policy, tmp_path, composer=Filter(), callbacks=[WatchedTraining(events)], iterations=4, **settings)
    stepped = [event[3] for event in events if event[0] == "step"]
    assert len(stepped) == 16
    assert 0 < sum(stepped) < 16
    assert sum(stepped) == run.trainer.global_step == sum(row["replay/trained_groups"] for row in run.rows)


def test_command_line_order(config: Path, tmp_path: Path) -> None:
    """The command's own callbacks keep the order: checkpoints last, metrics first."""
    cli = popo("fit", "--config", config, "--trainer.max_epochs", "1", "--run.folder", tmp_path)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names.index("Monitor") < names.index("ProximalSnapshot") < names.index("Evaluation")
    assert names[:2] == ["StopSignals", "OneCheckpoint"] and names[-1] == "Checkpoints"
    assert len(cli.datamodule.train_dataloader()) == 3


class Forgetful(TransformersEngine):
    """Drops its weights while the trainer works, as vLLM does at sleep level 2."""

    def sleep(self) -> None:
        self.holds_weights = False
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.zero_()

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        super().update_weights(weights, version)
        self.holds_weights = True


class Nothing(Composer):
    """Finds no group to train on, so no step is taken and the weights stay the same."""

    def compose(self, iteration: Iteration) -> list[Group]:
        iteration.rollout()
        return []


def test_weights_that_sleep_dropped_come_back_without_a_step(policy: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"composer": Nothing(), "iterations": 2}
    awake = fit(policy, tmp_path / "awake", engine=TransformersEngine(), **settings)
    slept = fit(policy, tmp_path / "slept", engine=Forgetful(), **settings)
    assert slept.trainer.global_step == 0 and slept.rows == awake.rows
