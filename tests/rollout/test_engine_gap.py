"""An engine that computes another policy than the trainer stops a run before it trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import on_two_ranks
from helpers.tiny_models import fit
from torch import Tensor

from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.core.errors import SettingError
from popo_lightning.engines.base import EngineContext, NamedTensors
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.rollout.engine_gap import EngineCheck, GapLimits, measured_gap


class Deaf(TransformersEngine):
    """Loses all weights of one kind on their way."""

    lost = "down_proj"

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        def heard() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                yield name, weight.flip(0) if self.lost in name else weight

        super().update_weights(heard(), version)


class Other(TransformersEngine):
    """Computes another model from the same files."""

    def start(self, context: EngineContext) -> None:
        super().start(context)
        for layer in self._model.model.layers:
            layer.self_attn.scaling *= 3


class Late(TransformersEngine):
    """Takes the first weights, but no later ones."""

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        if version < 1:
            super().update_weights(weights, version)


@pytest.mark.parametrize("engine, said", [(Deaf, "after the first weight sync"), (Other, "from the same files")])
def test_a_run_stops_before_it_trains(engine: Any, said: str, policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=rf"a LlamaForCausalLM, of which .*{engine.__name__}.*{said}.*gap_error"):
        fit(policy, tmp_path, engine=engine())
    assert not (tmp_path / "metrics.csv").exists()


def test_null_only_warns(policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = fit(policy, tmp_path, engine=Deaf(), iterations=1, monitor=Monitor(gap_error=None))
    assert "after the first weight sync" in caplog.text and len(run.rows) == 1


def test_a_run_stops_when_weights_no_longer_arrive(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not have the policy's weights"):
        fit(policy, tmp_path, engine=Late(), lr=0.05, iterations=6)


def test_a_good_engine_is_asked_four_times_and_its_floor_is_kept(policy: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    class Counts(TransformersEngine):
        def generate(self, *args: Any) -> Any:
            asked.append(self.version)
            return super().generate(*args)

    run = fit(policy, tmp_path, engine=Counts(), iterations=3)
    assert asked == [
        -1,
        0,
        0,
        1,
    ]  # as loaded, twice after the first sync, and once with other weights; training streams
    assert run.data.gap_floor is not None and 0 <= run.data.gap_floor < 1e-5
    state = run.data.state_dict()
    assert state["gap_floor"] == run.data.gap_floor
    run.data.check.floor = None  # type: ignore[union-attr]
    run.data.load_state_dict(state)
    assert run.data.gap_floor == state["gap_floor"]


def test_limits_follow_the_floor() -> None:
    limits = GapLimits()
    assert limits.above_warning(True, None) == limits.above_warning(True, 1e-6) == 1e-3
    assert limits.above_warning(False, 0.002) == 0.05
    assert limits.above_warning(False, 0.033) == pytest.approx(0.099)
    assert limits.above_error(True, 1e-6) == 0.01 and limits.above_error(False, 0.033) == pytest.approx(0.33)
    assert GapLimits(error=None).above_error(True, 1.0) == math.inf
    assert GapLimits(0.2, 0.3).above_warning(False, 0.5) == 0.2 and GapLimits(0.2, 0.3).above_error(False, 0.5) == 0.3


class Policy:
    """Has the parts of a policy that a check needs."""

    folder, model = "there", torch.nn.Linear(1, 1)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.compute_dtype = dtype


def check(*gaps: float, dtype: torch.dtype = torch.float32, error: Any = "auto") -> EngineCheck:
    found = iter(gaps)
    return EngineCheck(lambda: next(found), GapLimits(error=error), Policy(dtype), "Engine")


def test_what_a_sync_may_change() -> None:
    rounded = check(0.033, 0.04, dtype=torch.bfloat16)
    rounded.loaded(), rounded.synced()
    for gaps in ((1e-6, 0.005), (1e-6, math.nan), (0.005, 0.02)):
        broken = check(*gaps)
        broken.loaded()
        with pytest.raises(SettingError, match="as loaded, and"):
            broken.synced()
    broken = check(0.03, 0.1, dtype=torch.bfloat16)
    broken.loaded()
    with pytest.raises(SettingError, match="a Linear, of which log-probs by Engine"):
        broken.synced()
    lenient = check(1e-6, 0.2, error=0.3)
    lenient.loaded(), lenient.synced()
    with pytest.raises(SettingError, match="from the same files"):
        check(math.nan).loaded()
    with pytest.raises(SettingError, match="after a weight sync"):  # resumed from a checkpoint without a floor
        check(0.02).synced()
    check(math.nan, error=None).loaded()


def test_a_kernel_that_is_not_there_is_named() -> None:
    def fails() -> float:
        raise AttributeError("no attribute 'selective_scan_fwd'")

    broken = EngineCheck(fails, GapLimits(), Policy(), "Engine")
    with pytest.raises(SettingError, match=r"a Linear, on which Engine or the trainer fails .*selective_scan_fwd"):
        broken.loaded()


def uneven(folder: str) -> tuple[float, float]:
    """Returns the gap that both ranks find if their own gaps differ."""
    import torch.distributed as dist

    from popo_lightning.core.groups import Group, Response
    from popo_lightning.core.problems import Problem
    from popo_lightning.engines.base import Sampling

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    class Maker:
        def ungraded(self, problems: Any, n: int, sampling: Sampling, seed: int) -> list[Group]:
            assert sampling.max_new_tokens == 7
            ids = torch.arange(1 + 2 * rank)
            return [Group(0, problems[0], ids, [Response(ids, torch.zeros(len(ids)), "length", "")], 0)]

    class Scores:
        def logprobs(self, minibatch: Any) -> list[Tensor]:
            return [torch.full((1 + 2 * rank,), 1.0 + rank)]

    generator: Any = Maker()
    found = measured_gap(generator, Scores(), [Problem("0", "", None)], Sampling(7))
    dist.destroy_process_group()
    return found, rank


def test_all_ranks_find_the_same_gap(tmp_path: Path) -> None:
    found = on_two_ranks(uneven, tmp_path, "")
    assert [gap for gap, _ in found] == [(1 + 3 * 2) / 4] * 2
