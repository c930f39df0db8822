"""estimate/buffer_acc: by hand, off by default, from a run's own log-probs, over two ranks, and after a stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import fit

from popo_lightning.callbacks.monitor import Monitor, _of_all_ranks
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.metrics.buffer_estimate import SUMS, buffer_metrics, buffer_sums
from popo_lightning.replay.buffer import GroupReplayBuffer


def group(version: int, *accuracies: float) -> Group:
    responses = [
        Response(torch.tensor([1, 2]), torch.tensor([-1.0, -2.0]), "stop", "", {"score": a, "acc": a})
        for a in accuracies
    ]
    return Group(version, Problem(str(version), "", 0), torch.tensor([1]), responses, version)


def minibatch(prox: list[list[float]], is_start: bool = True) -> Minibatch:
    """Returns a replayed group and a fresh one, with two responses each."""
    made = Minibatch([group(3, 1.0, 0.0), group(5, 1.0, 1.0)], 5, 1)
    made.recorded["prox_logp"] = [torch.tensor(logp) for logp in prox]
    made.prox_is_start = is_start
    return made


BEHAVE = [-1.0, -2.0]


def test_by_hand() -> None:
    """The weights of the replayed group are 3 and 1. The fresh group does not count."""
    sums = buffer_sums(minibatch([[-1.0, -2.0 + math.log(3)], BEHAVE, [-9.0, -9.0], BEHAVE]))
    assert list(sums) == list(SUMS)
    assert list(sums.values()) == pytest.approx([1, 0.75, 0.5, 16 / 10, 0])
    even = buffer_sums(minibatch([BEHAVE] * 4))
    assert list(even.values()) == pytest.approx([1, 0.5, 0.5, 2, 1])
    found = buffer_metrics([sums, {}, even])
    assert found == pytest.approx(
        {
            "estimate/buffer_acc": 0.625,
            "estimate/buffer_sampled_acc": 0.5,
            "estimate/buffer_effective": 1.8,
            "estimate/buffer_groups": 2,
        }
    )
    assert "estimate/buffer_acc" not in buffer_metrics([sums, sums, even]), "refused below 2 effective responses"
    assert buffer_metrics([{}, {}]) == buffer_metrics([buffer_sums(minibatch([BEHAVE] * 4, is_start=False))]) == {}
    assert not any(buffer_sums(Minibatch([group(3, 1, 0)], 5, 0)).values())


def test_ranks_add_up() -> None:
    numbers = {"mean_loss": 0.1, "train_seconds": 1.0, "row_tokens": 5.0, "flops": 1.0}
    sums = [buffer_sums(minibatch([[-1.0, s], BEHAVE, BEHAVE, BEHAVE])) for s in (-2.0, -1.5)]
    together = _of_all_ranks([numbers | each for each in sums])
    assert buffer_metrics([together]) == pytest.approx(buffer_metrics(sums))
    assert set(_of_all_ranks([numbers])) == set(numbers)


def test_a_run(policy: Path, tmp_path: Path) -> None:
    """Switched off, it changes nothing. Switched on, it follows from the proximal log-probs of the minibatches."""
    seen: list[Minibatch] = []

    class Watching(Monitor):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            seen.append(batch)

    def composer() -> PrioritizedGroupReplay:
        return PrioritizedGroupReplay(GroupReplayBuffer(32))

    off = fit(policy, tmp_path / "off", monitor=Monitor(), composer=composer(), ppo_epochs=2)
    on = fit(policy, tmp_path / "on", monitor=Watching(estimate_buffer=True), composer=composer(), ppo_epochs=2)
    names = {name for row in on.rows for name in row if name.startswith("estimate/")}
    assert names == {f"estimate/buffer_{name}" for name in ("acc", "sampled_acc", "effective", "groups")}
    assert [{k: v for k, v in row.items() if k not in names} for row in on.rows] == off.rows
    assert all(torch.equal(on.weights[name], weight) for name, weight in off.weights.items())
    last = [batch for batch in seen if batch.version == 2 and batch.index >= 2]
    values = []
    for batch in last:
        prox = iter(batch.recorded["prox_logp"])
        for each in batch.groups:
            logs = np.array([float((next(prox) - r.behave_logp).sum()) for r in each.responses])
            if each.version < 2:
                values.append(np.exp(logs) @ each.rewards("acc").numpy() / np.exp(logs).sum())
    row = on.rows[-1]
    assert row["estimate/buffer_groups"] == len(values) == row["replay/groups"] > 0
    assert row["estimate/buffer_acc"] == pytest.approx(np.mean(values), abs=1e-5)
    assert row["estimate/buffer_acc"] != pytest.approx(row["estimate/buffer_sampled_acc"], abs=1e-4)


def test_one_minibatch_has_no_log_probs_to_use(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="minibatches is 1"):
        fit(policy, tmp_path, monitor=Monitor(estimate_buffer=True), minibatches=1)
