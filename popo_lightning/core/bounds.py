"""Setting checks that several rules share: one sentence each, with the setting, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from popo_lightning.core.errors import SettingError

Number = TypeVar("Number", int, float)
Choice = TypeVar("Choice", bound=str)  # a Literal

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127  # about 3.4e38; tensors hold no larger number


def held(setting: str, value: Number) -> Number:
    """Returns the value, or raises an error if it is finite and float32 cannot hold it; tensors of settings do."""
    if MAX_FLOAT32 < abs(value) < math.inf:
        raise SettingError(f"{setting} is {value}, which float32 cannot hold; use at most 3.4e38 in size.")
    return value


def finite(setting: str, value: float, example: str) -> float:
    """Returns the value if it is a finite number; else raises an error that ends with `example`."""
    if not math.isfinite(value):
        raise SettingError(f"{setting} is {value}; it must be a finite number, such as {example}.")
    return held(setting, value)


def above(setting: str, value: float, bound: float, example: str) -> float:
    """Returns the value if it is a finite number above the bound; else raises an error that ends with `example`."""
    if not bound < value < math.inf:
        raise SettingError(f"{setting} is {value}; it must be a finite number above {bound:g}, such as {example}.")
    return held(setting, value)


def at_least(setting: str, value: Number, bound: float, remedy: str = "") -> Number:
    """Returns the value if it is a finite number of at least the bound."""
    if not bound <= value < math.inf:
        raise SettingError(f"{setting} is {value}; it must be a finite number of at least {bound:g}{remedy}.")
    return held(setting, value)


def within(setting: str, value: float, low: float, high: float, example: str) -> float:
    """Returns the value if it is in [low, high]."""
    if not low <= value <= high:
        raise SettingError(f"{setting} is {value}; it must be in [{low:g}, {high:g}], such as {example}.")
    return value


def positive_share(setting: str, value: float, example: str) -> float:
    """Returns the value if it is in (0, 1]; else raises an error that ends with `example`."""
    return within(setting, above(setting, value, 0, example), 0, 1, example)


def between(setting: str, value: float, low: float, high: float, remedy: str) -> float:
    """Returns the value if it is in (low, high), without the bounds; else raises an error that ends with `remedy`."""
    if not low < value < high:
        raise SettingError(f"{setting} is {value}; it must be between {low:g} and {high:g}{remedy}.")
    return value


def one_of(setting: str, value: Choice, allowed: Sequence[str]) -> Choice:
    """Returns the value if it is one of the allowed ones."""
    if value not in allowed:
        raise SettingError(f"{setting} is {value!r}; it must be {', '.join(allowed[:-1])} or {allowed[-1]}.")
    return value
