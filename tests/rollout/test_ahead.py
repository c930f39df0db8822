"""Generating one iteration ahead overlaps with training and is corrected for. Nothing else changes."""

from __future__ import annotations

import csv
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers.engines import Apart
from helpers.groups import group
from helpers.tiny_models import Run, fit, method, metrics, popo, weights_of
from runs.test_resume import EVERY_STEP, ITERATIONS, MINIBATCHES, assert_same_run, checkpoint, copy_until

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import NamedTensors, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.methods.dapo import DynamicSampling
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.weights import TruncatedIS
from popo_lightning.replay.composer import OnPolicy
from popo_lightning.rollout.ahead import AsyncRollouts
from popo_lightning.rollout.iteration import IterationRollouts
from popo_lightning.rollout.limits import Limits
from popo_lightning.rollout.rank_states import reshard
from popo_lightning.rollout.report import RolloutReport
from popo_lightning.tasks.samplers import EpochSampler
from rollout.test_order import digest

SOON = 60.0  # seconds to wait for an event that must happen


def lagged(policy: Path, folder: Path, **settings: Any) -> Run:
    return fit(policy, folder, **({"engine": Apart(), "composer": OnPolicy(), "async_level": 1} | settings))


class Noting(Apart):
    """Records the weights that generate, and their thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, str]] = []
        self.given: list[tuple[int, str]] = []

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        super().update_weights(weights, version)
        self.given.append((version, digest(self._model)))

    def generate(self, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        found = super().generate(prompts, n, sampling, seed)
        self.calls.append((threading.current_thread().name, self.version, digest(self._model)))
        return found


class Watched(L.Callback):
    """Records groups by iteration, and compares each step's weight with the expected one."""

    def __init__(self) -> None:
        self.groups: dict[int, dict[int, int]] = {}  # version by group, by iteration
        self.problems: dict[int, list[str]] = {}
        self.worst = self.largest = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.groups.setdefault(batch.version, {}).update({group.id: group.version for group in batch.groups})
        self.problems.setdefault(batch.version, []).extend(group.problem.id for group in batch.groups)
        if batch.index == 0:  # no step yet, so these are the proximal weights
            self._start = {id(later): pl_module.logprobs(later) for later in [batch, *trainer.datamodule.pending]}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pairs = zip(self._start[id(batch)], batch.responses, strict=True)
        expected = torch.cat([(prox - response.behave_logp).exp() for prox, response in pairs]).sort().values
        if batch.version == 0:
            expected = torch.ones_like(expected)
        tokens = outputs["tokens"]  # without a cap the weights are the raw ones
        found = torch.cat((tokens.fresh_weights.values, tokens.replayed_weights.values)).sort().values
        self.worst = max(self.worst, float((expected - found).abs().max()))
        self.largest = max(self.largest, float((found - 1).abs().max()))


@pytest.fixture(scope="module")
def watched(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Noting, Watched]:
    engine, training = Noting(), Watched()
    objective = Objective(behave_weight=TruncatedIS(cap=None))
    folder = tmp_path_factory.mktemp("watched")
    run = lagged(
        policy, folder, engine=engine, callbacks=[training], objective=objective, iterations=4, minibatches=3, lr=3e-3
    )
    return run, engine, training


def test_ages(watched: tuple[Run, Noting, Watched]) -> None:
    run, _, training = watched
    ages = {version: {version - of for of in groups.values()} for version, groups in training.groups.items()}
    assert ages == {0: {0}, 1: {1}, 2: {1}, 3: {1}}
    assert all(row["replay/groups"] == 0 for row in run.rows), "generated ahead is not replayed"
    assert [sorted(groups) for groups in training.groups.values()] == [
        list(range(i * 10, i * 10 + 10)) for i in range(4)
    ]
    assert [row["total/responses"] for row in run.rows] == [40, 80, 120, 160]


def test_weights_that_generate_are_those_of_the_iteration_before(watched: tuple[Run, Noting, Watched]) -> None:
    _, engine, _ = watched
    given = dict(engine.given)
    assert [version for version, _ in engine.given] == [0, 1, 2, 3] and len(set(given.values())) == 4
    threads, versions, weights = zip(*engine.calls, strict=True)
    assert versions == (0, 0, 1, 2, 3)  # the last one is for a resumed run
    assert threads == ("MainThread", *["look-ahead"] * 4)
    assert list(weights) == [given[version] for version in versions]


def test_the_weight_is_prox_over_behave(watched: tuple[Run, Noting, Watched]) -> None:
    run, _, training = watched
    assert training.worst < 1e-4
    assert training.largest > 0.05, "weights of 1 would prove nothing"
    for row in run.rows[1:]:
        assert "weight/fresh_mean" not in row and "weight/ess_age_1" in row
    assert run.rows[0]["engine/logp_gap_max"] < 1e-4


class Meeting(Apart):
    """Each side continues only after the other has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.training, self.generating = threading.Semaphore(0), threading.Semaphore(0)
        self.met: list[bool] = []

    def generate(self, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        if threading.current_thread() is not threading.main_thread():
            self.generating.release()
            self.met.append(self.training.acquire(timeout=SOON))
        return super().generate(prompts, n, sampling, seed)


class Meets(L.Callback):
    def __init__(self, engine: Meeting) -> None:
        self.engine = engine

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.index == 1:  # in the middle of the iteration
            self.engine.training.release()
            self.engine.met.append(self.engine.generating.acquire(timeout=SOON))


def test_training_and_generation_overlap(policy: Path, tmp_path: Path) -> None:
    engine = Meeting()
    lagged(policy, tmp_path, engine=engine, callbacks=[Meets(engine)], iterations=3)
    assert engine.met == [True] * 6


def test_with_weights_that_stay_the_same_nothing_is_different(policy: Path, tmp_path: Path) -> None:
    """Seeds, problems, metrics and counts are those of the iteration that uses the groups."""
    found = []
    for lag in (0, 1):
        training = Watched()
        run = lagged(policy, tmp_path / str(lag), async_level=lag, callbacks=[training], lr=0.0)
        names = ("rollout/", "reward/", "total/", "replay/")
        rows = [{k: v for k, v in row.items() if k.startswith(names)} for row in run.rows]
        found.append((rows, training.problems, [sorted(groups) for groups in training.groups.values()]))
    assert found[0] == found[1]


def test_evaluation_in_between_changes_nothing(policy: Path, tmp_path: Path) -> None:
    without = lagged(policy, tmp_path / "without")
    evaluation = Evaluation(every_n_iterations=1, samples=2, avg_k=2, pass_k=2)
    evaluated = lagged(policy, tmp_path / "evaluated", callbacks=[evaluation])
    assert len(evaluation.history) == 4
    rows = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in evaluated.rows]
    assert [row for row in rows if "train/loss" in row] == without.rows
    assert all(torch.equal(without.weights[name], weight) for name, weight in evaluated.weights.items())


def test_further_calls_are_synchronous_and_newest(policy: Path, tmp_path: Path) -> None:
    """Dynamic sampling uses the groups at hand and adds more. The rest waits, and no problem is lost."""
    training, engine = Watched(), Noting()
    run = lagged(policy, tmp_path, engine=engine, composer=DynamicSampling(), callbacks=[training], iterations=4)
    ages = [{version - of for of in groups.values()} for version, groups in training.groups.items()]
    assert all(found <= {0, 1, 2} for found in ages) and {0, 1} <= ages[1] | ages[2] | ages[3]
    later = [version for thread, version, _ in engine.calls if thread == "MainThread"]
    assert later == sorted(later) and set(later) > {0}
    sampler = run.data.sampler
    assert isinstance(sampler, EpochSampler)
    assert sampler.cursor * 4 == run.data.totals.responses + len(run.data.ahead) * 4


# -- what can go wrong -----------------------------------------------------------------------------------------


class Breaking(Apart):
    """Fails at one of its calls."""

    def __init__(self, call: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = call, error

    def generate(self, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().generate(prompts, n, sampling, seed)


@pytest.mark.parametrize("error", [RuntimeError("no server is left"), SettingError("data.x is 3; use 4")])
def test_failures_surface_with_their_words(policy: Path, tmp_path: Path, error: Exception) -> None:
    engine = Breaking(2, error)
    with pytest.raises(type(error), match=str(error)):
        lagged(policy, tmp_path, engine=engine)
    assert len(metrics(tmp_path)) == 1, "the iteration under way is finished first"


def test_a_failure_that_nobody_needs_is_told(policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = set(threading.enumerate())
    with caplog.at_level(logging.WARNING):
        run = lagged(policy, tmp_path, engine=Breaking(4, RuntimeError("no server is left")))
    assert len(run.rows) == 3 and "no server is left" in caplog.text
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "look-ahead"]


class Slow(Apart):
    def generate(self, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        time.sleep(0.5)
        return super().generate(prompts, n, sampling, seed)


def test_seconds_of_two_threads(policy: Path, tmp_path: Path) -> None:
    lagged(policy, tmp_path, engine=Slow())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    for row in rows[1:]:
        assert row.get("time/generate", 0.0) == 0 and row.get("time/verify", 0.0) == 0
        assert row["time/ahead"] >= 0.5
        phases = [v for k, v in row.items() if k.startswith("time/") and k not in ("time/ahead", "time/iteration")]
        assert sum(phases) == pytest.approx(row["time/iteration"], abs=1e-3)
        assert 0 <= row["time/wait"] <= row["time/ahead"] and row["time/other"] > -1e-3


def test_an_engine_in_the_process_is_refused(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data.async_level is 1, but data.engine is TransformersEngine"):
        lagged(policy, tmp_path, engine=TransformersEngine())
    with pytest.raises(SettingError, match=r"data.async_level is 2; use 0"):
        lagged(policy, tmp_path, async_level=2)


def test_a_checkpoint_of_other_ranks_is_refused() -> None:
    state = {"sampler": {"cursor": 0}, "composer": {}, "pending": [], "rollout_metrics": {}, "groups_made": 0}
    states = [state | {"ahead": {"indices": [1], "groups": []}}, state | {"ahead": {}}]
    with pytest.raises(SettingError, match=r"generated ahead \(data.async_level\)"):
        reshard(states, 1, EpochSampler(), OnPolicy())
    assert reshard(states, 2, EpochSampler(), OnPolicy()) is states


# -- the queue, by hand ----------------------------------------------------------------------------------------


def made(*ids: int) -> Callable[[], list[Any]]:
    return lambda: [group(id) for id in ids]


def test_groups_wait_in_order() -> None:
    ahead = AsyncRollouts()
    assert ahead.take(3, 2) == [] and ahead.state_dict() == {} and ahead.report() == {}
    ahead.begin([7, 8, 9], PhaseClock(), made(0, 1, 2))
    assert len(ahead) == 3
    assert [(place, found.id) for place, found in ahead.take(2, 2)] == [(7, 0), (8, 1)]
    ahead.begin([5], PhaseClock(), made(3))
    other = AsyncRollouts()
    other.load_state_dict(ahead.state_dict())
    for each in (ahead, other):
        assert len(each) == 2
        assert [(place, found.id) for place, found in each.take(9, 2)] == [(9, 2), (5, 3)]
        assert len(each) == 0
    with pytest.raises(SettingError, match=r"data\.async_level is 0, but the checkpoint"):
        AsyncRollouts().load_state_dict({"indices": [1], "groups": []}, async_level=0)
    ahead.begin([4], PhaseClock(), made(5))
    with pytest.raises(SettingError, match="groups of 2 responses ahead"):
        ahead.take(1, 3)
    ahead.close()


def test_only_what_is_missing_is_generated() -> None:
    class Sampler(EpochSampler):
        observed: list[int]

        def observe(self, indices: Sequence[int], groups: Sequence[Any]) -> None:
            self.observed = list(indices)

    class Maker:
        rank = 0

        def __init__(self) -> None:
            self.asked: list[tuple[int, int]] = []

        def apart(self, clock: PhaseClock) -> Maker:
            return self

        def numbered(self, found: Any) -> Any:
            return found

        def make(self, problems: Sequence[Any], n: int, sampling: Any, seed: int, prefixes: Any = None) -> list[Any]:
            self.asked.append((len(problems), seed))
            return [group(problem) for problem in problems]

    sampler, maker, ahead = Sampler(), Maker(), AsyncRollouts()
    sampler.start(100, 1, 0, 1)
    rules = {"sampler": sampler, "composer": OnPolicy(), "limits": Limits()}
    settings = {"group_size": 2, "seed": 1, "sampling": Sampling(4), "behave": "engine", "effective_key": None}
    common: dict[str, Any] = {**rules, **settings, "generator": maker, "ahead": ahead, "components": set()}

    def rollouts(version: int) -> IterationRollouts:
        report, policy = RolloutReport(version, "score"), SimpleNamespace(reward_key="score")
        asked: list[Any] = list(range(100))
        data = SimpleNamespace(iteration=version, problems=SimpleNamespace(train=asked), **common)
        return IterationRollouts(data, policy, report, 6)  # type: ignore[arg-type]

    rollouts(1).generate_ahead()
    first = rollouts(1)
    taken = [found.id for found in first.rollout(4)]
    rollouts(2).generate_ahead()
    second = rollouts(2)
    taken += [found.id for found in second.rollout()]
    assert len(sampler.observed) == 6
    taken += [found.id for found in second.rollout(2)]
    assert [count for count, _ in maker.asked] == [6, 4, 2]
    assert len({seed for _, seed in maker.asked}) == 3
    twin = EpochSampler()
    twin.start(100, 1, 0, 1)
    assert taken == twin.draw(12), "problems come in the sampler's order, each once"
    assert len(second.report.fresh) == 8
    ahead.close()


# -- resuming --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(config: Path) -> list[str | Path]:
    samples = ["--samples.every_n_iterations", "1"]
    ahead = ["--data.engine", "helpers.engines.Apart", "--data.async_level", "1"]
    keep_all = ["--checkpoint.every_n_epochs", "2", "--checkpoint.save_top_k", "-1"]
    return ["fit", "--config", config, *method("popo"), *ahead, *keep_all, *samples]


@pytest.fixture(scope="module")
def every_step(command: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writing checkpoints waits for the groups and changes nothing."""
    whole, every_step = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("every_step")
    popo(*command, "--run.folder", whole)
    popo(*command, *EVERY_STEP, "--run.folder", every_step)
    assert_same_run(every_step, whole)
    assert sum(row.get("replay/groups", 0) for row in metrics(whole)) > 0
    return every_step


def test_stopped_between_iterations(command: list[str | Path], every_step: Path, tmp_path: Path) -> None:
    popo(*command, "--run.folder", tmp_path, "--trainer.max_epochs", "2", "--evaluation.every_n_iterations", "2")
    state = torch.load(checkpoint(tmp_path, 2 * MINIBATCHES), weights_only=True)["RolloutDataModule"]
    assert len(state["ranks"][0]["ahead"]["groups"]) == 9
    popo(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert_same_run(tmp_path, every_step)


@pytest.mark.parametrize("step", [7, 9])
def test_stopped_inside_an_iteration(command: list[str | Path], every_step: Path, tmp_path: Path, step: int) -> None:
    folder = copy_until(every_step, step, tmp_path / "copy")
    cli = popo(*command, *EVERY_STEP, "--run.folder", folder, "--run.resume", "true")
    assert_same_run(folder, every_step)
    assert cli.trainer.global_step == ITERATIONS * MINIBATCHES and weights_of(cli.model)


@pytest.mark.parametrize(("hook", "minibatch", "step"), [("on_train_batch_start", 1, 5), ("on_train_epoch_end", 0, 6)])
def test_stopped_by_a_signal(
    command: list[str | Path], every_step: Path, tmp_path: Path, hook: str, minibatch: int, step: int
) -> None:
    """The checkpoint where the run stops contains the groups generated ahead."""
    signalled = ["--trainer.callbacks+", "helpers.tiny_models.SignalAt", "--trainer.callbacks.hook", hook]
    signalled += ["--trainer.callbacks.iteration", "2", "--trainer.callbacks.minibatch", str(minibatch)]
    with pytest.raises(SystemExit) as ended:
        popo(*command, *signalled, "--run.folder", tmp_path)
    assert ended.value.code == 130
    state = torch.load(checkpoint(tmp_path, step), weights_only=True)["RolloutDataModule"]
    assert len(state["ranks"][0]["ahead"]["groups"]) == 9
    popo(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert_same_run(tmp_path, every_step)
