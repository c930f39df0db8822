"""ReMix's mixing and RAPID's rollouts ahead: which batch is trained on, and in which iterations nothing is sampled."""

from __future__ import annotations

import copy
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from helpers.groups import group, ids, iteration
from helpers.tiny_models import fit

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.engines.base import NamedTensors
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.methods.rapid import RAPID
from popo_lightning.methods.remix import ReMixReplay
from popo_lightning.replay.composer import Composer

DULL = (1.0, 1.0)  # scores of an ineffective group


def batch(version: int, size: int = 2) -> list[Group]:
    """Returns a batch numbered by version: 30 and 31 for version 3. The second group is ineffective."""
    return [group(10 * version + i, version, scores=DULL if i == 1 else (0.0, 1.0)) for i in range(size)]


def run(composer: Composer, versions: range, seed: int = 0, size: int = 2) -> list[list[int]]:
    """Returns the numbers of the groups of each iteration."""

    def random(version: int) -> Callable[..., Random]:
        return lambda *purpose: Random(f"{seed}/{version}/{purpose}")

    return [ids(composer.compose(iteration(v, batch(v, size), seeded=random(v)))) for v in versions]


def resumed(composer: Composer, fresh: Composer, folder: Path) -> Composer:
    torch.save(composer.state_dict(), folder / "state.pt")
    fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return fresh


# -- ReMix ---------------------------------------------------------------------------------------------------------


def test_always_replaying_still_samples_every_third_batch() -> None:
    """N = 2: the batch of version 0 serves versions 1 and 2. At version 3 it is too old, and there is no other."""
    assert run(ReMixReplay(1.0, 2), range(7)) == [[0, 1], [0, 1], [0, 1], [30, 31], [30, 31], [30, 31], [60, 61]]
    assert run(ReMixReplay(1.0, 1), range(4)) == [[0, 1], [0, 1], [20, 21], [20, 21]]


def test_never_replaying_is_on_policy() -> None:
    assert run(ReMixReplay(0.0), range(4)) == [[0, 1], [10, 11], [20, 21], [30, 31]]


def test_a_replaying_iteration_samples_nothing() -> None:
    composer = ReMixReplay(1.0)
    composer.compose(iteration(0, batch(0)))
    for version in (1, 2):
        assert not composer.samples_next()
        assert ids(composer.compose(iteration(version, num_problems=2))) == [0, 1]  # the iteration refuses to sample
    assert composer.samples_next()
    with pytest.raises(AssertionError, match="asked for 2"):
        composer.compose(iteration(3, num_problems=2))


@pytest.mark.parametrize("mix", ["batch", "group"])
def test_says_ahead_whether_it_samples(mix: Any) -> None:
    composer = ReMixReplay(0.5, 2, stop_at=30, mix=mix)
    for version in range(40):
        announced = composer.samples_next()
        (groups,) = run(composer, range(version, version + 1), size=8)
        fresh = [number for number in groups if number >= 10 * version]
        assert announced or not fresh
        assert mix == "group" or len(fresh) == 8 * announced
        assert version < 30 or len(fresh) == 8


def test_share_of_iterations_that_sample() -> None:
    """A sample is followed by one replay with probability p, by a second with p^2, and never by a third.

    So 1 of 1 + p + p^2 iterations samples, 0.641 for p = 0.4.
    """
    found = run(ReMixReplay(0.4, 2, stop_at=None), range(1500))
    share = sum(groups[0] == 10 * version for version, groups in enumerate(found)) / len(found)
    assert share == pytest.approx(1 / 1.56, abs=0.03)


def test_every_recent_policy_is_drawn_evenly() -> None:
    composer = ReMixReplay(0.0, 3)
    run(composer, range(4))
    composer.probability = 1.0
    drawn: Counter[int] = Counter()
    for seed in range(600):
        again = copy.deepcopy(composer)
        run(again, range(4, 5), seed)  # decides about version 5, for which versions 2 to 4 are recent
        drawn[run(again, range(5, 6))[0][0]] += 1
    assert set(drawn) == {20, 30, 40}
    assert all(170 < count < 230 for count in drawn.values())


def test_on_policy_from_the_reincarnation_on() -> None:
    composer = ReMixReplay(1.0, 2, stop_at=5)
    assert run(composer, range(6))[4:] == [[30, 31], [50, 51]]
    assert composer.state_dict() == {"_batches": [], "_replay": None}  # at once: nothing more is replayed
    assert run(composer, range(6, 8)) == [[60, 61], [70, 71]]


def test_mixing_by_group_samples_the_rest() -> None:
    composer = ReMixReplay(0.5, 2, stop_at=None, mix="group")
    kept: list[int] = []
    for version in range(60):
        groups = composer.compose(iteration(version, batch(version, 8)))
        assert len(groups) == len(set(ids(groups))) == 8
        ages = [version - each.version for each in groups]
        assert min(ages) >= 0 and max(ages) <= 2
        fresh = [each.id for each in groups if each.version == version]
        assert fresh == [10 * version + i for i in range(len(fresh))]  # exactly the requested number
        kept.append(len(fresh))
    assert kept[0] == 8
    assert sum(kept[1:]) / (8 * 59) == pytest.approx(0.5, abs=0.08)


def decide(rank: int, port: int, folder: str) -> None:
    """Runs a rank with its own random numbers, as data.py gives them."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = run(ReMixReplay(0.5, 2), range(30), seed=rank)
    dist.destroy_process_group()
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_ranks_sample_in_the_same_iterations(tmp_path: Path) -> None:
    """All ranks must agree. Ranks that replay would wait for those that sample, so no rollouts would be saved."""
    assert run(ReMixReplay(0.5, 2), range(30), seed=0) != run(ReMixReplay(0.5, 2), range(30), seed=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(decide, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert found[0] == found[1] == run(ReMixReplay(0.5, 2), range(30), seed=0)


@pytest.mark.parametrize("mix", ["batch", "group"])
@pytest.mark.parametrize("stop", [1, 4, 11])
def test_remix_resumes(mix: Any, stop: int, tmp_path: Path) -> None:
    whole = run(ReMixReplay(0.5, 3, mix=mix), range(20), size=4)
    composer = ReMixReplay(0.5, 3, mix=mix)
    before = run(composer, range(stop), size=4)
    composer = resumed(composer, ReMixReplay(0.5, 3, mix=mix), tmp_path)  # type: ignore[assignment]
    assert before + run(composer, range(stop, 20), size=4) == whole


def test_a_replayed_batch_keeps_its_groups_whole(tmp_path: Path) -> None:
    composer = ReMixReplay(1.0)
    (sampled, _) = composer.compose(iteration(0, batch(0)))
    (replayed, _) = resumed(composer, ReMixReplay(1.0), tmp_path).compose(iteration(1, num_problems=2))
    assert (replayed.version, replayed.problem) == (0, sampled.problem)
    assert torch.equal(replayed.responses[0].behave_logp, sampled.responses[0].behave_logp)


@pytest.mark.parametrize("wrong", [{"probability": 1.1}, {"policies": 0}, {"stop_at": -1}, {"mix": "token"}])
def test_remix_refuses(wrong: dict[str, Any]) -> None:
    (setting,) = wrong
    with pytest.raises(SettingError, match=f"ReMixReplay.{setting} is "):
        ReMixReplay(**wrong)


# -- RAPID ---------------------------------------------------------------------------------------------------------


def ahead(version: int) -> Any:
    """Returns an iteration in which three batches of two problems can be sampled."""
    return iteration(version, batch(version, 6), num_problems=2)


def test_batches_sampled_at_once_are_trained_on_one_by_one() -> None:
    composer = RAPID(3)
    first = composer.compose(ahead(0))
    assert ids(first) == [0, 1]
    later = [composer.compose(iteration(version, num_problems=2)) for version in (1, 2)]  # these refuse to sample
    assert [ids(groups) for groups in later] == [[2, 3], [4, 5]]
    assert {each.version for groups in later for each in groups} == {0}
    assert ids(composer.compose(ahead(3))) == [30, 31]


def test_one_batch_at_a_time_is_on_policy() -> None:
    assert run(RAPID(1), range(3)) == [[0, 1], [10, 11], [20, 21]]


def test_as_many_problems_as_asked_for() -> None:
    asked: list[tuple[int, int]] = []

    def next_problems(count: int, n: int) -> list[Group]:
        asked.append((count, n))
        return batch(0, count)

    RAPID(4).compose(iteration(0, num_problems=3, group_size=5, next_problems=next_problems))
    assert asked == [(12, 5)]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_rapid_resumes(stop: int, tmp_path: Path) -> None:
    composer: Composer = RAPID(3)
    found = []
    for version in range(7):
        if version == stop:
            composer = resumed(composer, RAPID(3), tmp_path)
        found.append(ids(composer.compose(ahead(version))))
    assert found == [[0, 1], [2, 3], [4, 5], [30, 31], [32, 33], [34, 35], [60, 61]]


def test_resumed_with_other_numbers_of_problems_nothing_is_lost(tmp_path: Path) -> None:
    composer = RAPID(3)
    composer.compose(ahead(0))
    later = resumed(composer, RAPID(3), tmp_path)
    assert ids(later.compose(iteration(1, num_problems=3))) == [2, 3, 4]
    assert ids(later.compose(iteration(2, num_problems=3))) == [5]


def test_rapid_refuses() -> None:
    with pytest.raises(SettingError, match=r"RAPID\.batches is 0"):
        RAPID(0)


class CountingEngine(TransformersEngine):
    updates = 0

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        super().update_weights(weights, version)
        self.updates += 1


def test_the_engine_gets_weights_only_when_it_samples(policy: Path, tmp_path: Path) -> None:
    engine = CountingEngine()
    done = fit(policy, tmp_path, composer=RAPID(3), engine=engine, iterations=7)
    assert engine.updates == 3  # at iterations 0, 3 and 6
    assert done.data.composer.samples_next() is False
