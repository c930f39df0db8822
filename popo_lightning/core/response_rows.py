"""Reads responses from untrusted files of JSON lines: rows, token ids and log-probs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError, reason

MAX_TOKENS = 10**6  # per response
ROUNDING = 1e-3  # how far an engine's rounding may put a log-prob above 0


def rows_of(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a file of JSON lines with their numbers, from 1.

    Raises:
        SettingError: A line is no JSON object, or the file cannot be read.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield number, _row(line, f"'{file}' cannot be read as JSON lines: line {number} is none")
    except OSError as error:
        raise SettingError(f"'{file}' cannot be read ({reason(error)}); name another file") from error


def _row(line: bytes, fault: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        if not isinstance(row, dict):
            raise ValueError("no JSON object")
        return row
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)
        raise SettingError(f"{fault} ({why}); delete that line, or name another file") from error


def token_ids(found: Any, name: str) -> Tensor:
    """Converts a list of numbers to (T,) int64 token ids; raises ValueError with the value's key if they are none."""
    if not isinstance(found, list) or len(found) > MAX_TOKENS or any(type(i) is not int or i < 0 for i in found):
        raise ValueError(f"{name} are no token ids")
    return torch.tensor(found, dtype=torch.long)


def log_probs(found: Any) -> Tensor:
    """Converts a list of numbers to (T,) float32 log-probs; raises ValueError if they are none."""
    logp = torch.tensor([float(value) for value in found], dtype=torch.float32)
    if not bool(torch.isfinite(logp).all()) or bool((logp > ROUNDING).any()):
        raise ValueError("behave_logp are no log-probs")
    return logp
