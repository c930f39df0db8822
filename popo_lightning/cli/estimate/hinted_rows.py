"""Reads responses to prompts with and without a hint, for the instrument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from popo_lightning.cli.estimate.action import Holds, field_of
from popo_lightning.core.errors import SettingError
from popo_lightning.core.response_rows import rows_of
from popo_lightning.metrics.effective import Floats


@dataclass(frozen=True)
class HintedRows:
    """N sampled responses.

    Args:
        hinted: (N,) whether the prompt had the hint.
        acts: (N,) whether the response shows the behavior.
        rewards: (N,) rewards.
        problems: Name of each response's problem.
    """

    hinted: NDArray[np.bool_]
    acts: NDArray[np.bool_]
    rewards: Floats
    problems: list[str]


def hinted_rows(files: Sequence[str], instrument: str, holds: Holds, reward: str) -> HintedRows:
    """Reads the responses in files of JSON lines, except the greedy ones of an evaluation.

    Args:
        files: Paths, such as evaluations/iteration-000100/NAME.jsonl.
        instrument: Field that is 0 or 1 (or false, true).
        holds: Whether a row's response shows the behavior.
        reward: Field or reward component with the reward.

    Raises:
        SettingError: A file cannot be read, or a row lacks a field.
    """
    hinted, acts, rewards, problems = [], [], [], []
    for file in files:
        path = Path(file).expanduser()
        if not path.is_file():
            raise SettingError(f"FILE is '{file}', which is no file; name files of JSON lines")
        for number, row in rows_of(path):
            if row.get("greedy") is True:
                continue
            where = f"line {number} of '{file}'"
            hinted.append(_coin(row, instrument, where))
            acts.append(holds(row))
            rewards.append(_reward(row, reward, where))
            problems.append(str(row.get("problem", f"{file} {number}")))
    if not rewards:
        raise SettingError(f"{', '.join(files)} holds no sampled responses; name files of JSON lines that do")
    return HintedRows(np.array(hinted, bool), np.array(acts, bool), np.array(rewards, float), problems)


def _coin(row: Mapping[str, Any], name: str, where: str) -> bool:
    found = row.get(name)
    if found not in (0, 1):  # false and true equal these
        raise SettingError(
            f"{where} has {name} {str(found)[:40]!r}, but --instrument takes a field that is 0 or 1 in every row; "
            "data.task Hinted randomizes one, and evaluation.breakdown writes it"
        )
    return bool(found)


def _reward(row: Mapping[str, Any], name: str, where: str) -> float:
    with suppress(KeyError):
        found = field_of(row, name)
        if isinstance(found, bool | int | float):
            return float(found)
    raise SettingError(f"{where} has no number '{name}', which --reward names; name a reward component that is there")
