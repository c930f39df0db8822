"""The admission test of stored groups, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.groups import group, ids, iteration
from helpers.tiny_models import fit
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.methods.popo_gated import GatedReplay
from popo_lightning.metrics.monitors import NAMES
from popo_lightning.replay.buffer import GroupReplayBuffer

DULL = (1.0, 1.0)
# behave is -0.5 at every token. Of the 4 tokens of a group, one has moved to weight w and three have not: ESS = (3 +
# w)^2 / (4 (3 + w^2)), which is 0.893 for w = 2 and 0.75 for w = 3.
MOVED = {0: 1.0, 1: 2.0, 2: 3.0}
ESS = {0: 1.0, 1: 25 / 28, 2: 36 / 48}


def moved(groups: Sequence[Group]) -> list[list[Tensor]]:
    return [[torch.tensor([-0.5 + math.log(MOVED[g.id]), -0.5]), torch.tensor([-0.5, -0.5])] for g in groups]


def composed(min_ess: float) -> list[int]:
    composer = GatedReplay(GroupReplayBuffer(8), min_ess)
    composer.buffer.insert([group(0, 1), group(1, 3), group(2, 4)], 8)
    fresh = [group(10, 5), *(group(i, 5, scores=DULL) for i in (11, 12, 13))]
    trained = ids(composer.compose(iteration(5, fresh, present_logprobs=moved)))
    assert ids(composer.buffer.newest(9, 6)) == [10, 2, 1, 0]  # refused groups stay
    return trained


def test_groups_are_admitted_by_effective_sample_size() -> None:
    assert composed(0.0) == [10, 2, 1, 0]  # POPO
    assert composed(ESS[2] + 1e-6) == [10, 1, 0]
    assert composed(ESS[1] - 1e-6) == [10, 1, 0]
    assert composed(ESS[1] + 1e-6) == [10, 0]
    assert composed(1.0) == [10, 0]


def test_no_forward_pass_without_a_place_to_fill() -> None:
    composer = GatedReplay(GroupReplayBuffer(8))
    composer.buffer.insert([group(0, 1)], 8)
    assert ids(composer.compose(iteration(5, [group(10, 5), group(11, 5)]))) == [10, 11]


def test_a_share_outside_the_range_is_refused() -> None:
    with pytest.raises(SettingError, match=r"min_ess is 1\.5"):
        GatedReplay(GroupReplayBuffer(8), 1.5)


def test_its_pass_has_the_phase_of_the_tables(policy: Path, tmp_path: Path) -> None:
    """The terminal, TensorBoard and docs/metrics.md use the names of phases. They would not show a misnamed phase."""
    run = fit(policy, tmp_path, composer=GatedReplay(GroupReplayBuffer(32)), iterations=2)
    columns = (run.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    phases = {column.removeprefix("time/") for column in columns if column.startswith("time/")}
    assert "rescore" in phases and phases <= {name.removeprefix("time/") for name in NAMES}
