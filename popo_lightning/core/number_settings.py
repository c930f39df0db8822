"""Refuses numbers that no computation accepts: not finite, or too large for an integer, for a tensor or for memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from popo_lightning.core.bounds import held
from popo_lightning.core.errors import SettingError

LARGEST = 2**63 - 1  # the largest 64-bit integer
# Largest values, and what each unit takes: memory, or a process.
MAX: dict[str, tuple[int, str]] = {
    "data.problems_per_iteration": (2**20, "each is held in memory with its responses"),
    "data.group_size": (2**20, "each response is held in memory"),
    "data.ppo_epochs": (2**16, "the minibatches of all are held in memory"),
    "data.num_graders": (1024, "each is a process"),
    "evaluation.samples": (2**16, "each response is held in memory"),
}
RESPONSES = 2**24  # per iteration
LINKED = ("model.temperature", "data.seed")  # these take another setting's value
# Classes of other packages may use a number that is not finite.
KNOWN = ("popo_lightning", "lightning", "torch", "torchao")


def check_numbers(config: Any) -> None:
    """Raises SettingError for the first number that no computation accepts.

    Args:
        config: Settings as parsed.
    """
    for setting, value, known in _numbers(config, "", True):
        if isinstance(value, float):
            if known and not math.isfinite(value) and setting not in LINKED:
                raise SettingError(f"{setting} is {value}; use a finite number, or leave it out for its default")
            if known:
                held(setting, value)
            continue
        most, reason = MAX.get(setting, (LARGEST, "the largest 64-bit integer"))
        if not -LARGEST <= value <= most:
            raise SettingError(f"{setting} is {shortened(value)}; use at most {most}: {reason}")
    data = config.get("data") or {}
    problems, size = data.get("problems_per_iteration"), data.get("group_size")
    if problems and size and problems * size > RESPONSES:
        raise SettingError(
            f"data.problems_per_iteration is {problems} and data.group_size {size}, together {problems * size} "
            f"responses in an iteration, which memory holds at once; lower one, to {RESPONSES} responses at most"
        )


def shortened(value: int) -> str:
    """Formats an integer; one with 100 digits or more by its number of digits."""
    digits = math.floor(abs(value).bit_length() * math.log10(2)) + 1
    return str(value) if digits < 100 else f"a number of about {digits} digits"


def _numbers(value: Any, setting: str, known: bool) -> Iterator[tuple[str, int | float, bool]]:
    """Yields the numbers in settings: the setting, the number, and whether a known class takes it."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield setting, value, known
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _numbers(part, f"{setting}[{place}]", known)
    else:
        parts = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        path = parts.get("class_path")
        if isinstance(path, str):
            known = path.partition(".")[0] in KNOWN
        for name, part in parts.items():
            within = setting if name == "init_args" else f"{setting}.{name}".lstrip(".")
            yield from _numbers(part, within, known)
