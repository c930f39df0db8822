"""Callbacks that training cannot do without, for a trainer that was made without them."""

from __future__ import annotations

from typing import Any

from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.proximal.critic_values import CriticValues
from popo_lightning.proximal.parameter_hook import ParameterHook
from popo_lightning.proximal.snapshot import ProximalPolicy, ProximalSnapshot


def supply(callbacks: list[Any]) -> None:
    """Puts those that are missing where the command line has them: metrics before all who read them.

    Args:
        callbacks: A trainer's, which are changed in place.
    """
    if _last(callbacks, Monitor) < 0:
        callbacks.insert(0, Monitor())
    if _last(callbacks, ProximalPolicy) < 0:
        behind = max(_last(callbacks, kind) for kind in (Monitor, ParameterHook))
        callbacks.insert(behind + 1, ProximalSnapshot())
    if _last(callbacks, CriticValues) < 0:
        callbacks.insert(_last(callbacks, ProximalPolicy) + 1, CriticValues())


def _last(callbacks: list[Any], kind: type) -> int:
    """Place of the last one of a kind, -1 for none."""
    return max((place for place, one in enumerate(callbacks) if isinstance(one, kind)), default=-1)
