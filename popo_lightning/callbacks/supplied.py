"""Adds the callbacks that training needs to a trainer that was made without them."""

from __future__ import annotations

import lightning as L

from popo_lightning.callbacks.forgotten_state import ForgottenState
from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.proximal.critic_values import CriticValues
from popo_lightning.proximal.parameter_hook import ParameterHook
from popo_lightning.proximal.snapshot import ProximalPolicy, ProximalSnapshot


def supply(callbacks: list[L.Callback]) -> None:
    """Inserts missing callbacks in the command line's order: metrics before all callbacks that read them.

    Args:
        callbacks: Callbacks of a trainer; changed in place.
    """
    if _last(callbacks, Monitor) < 0:
        callbacks.insert(0, Monitor())
    if _last(callbacks, ProximalPolicy) < 0:
        behind = max(_last(callbacks, kind) for kind in (Monitor, ParameterHook))
        callbacks.insert(behind + 1, ProximalSnapshot())
    if _last(callbacks, CriticValues) < 0:
        callbacks.insert(_last(callbacks, ProximalPolicy) + 1, CriticValues())
    if _last(callbacks, ForgottenState) < 0:
        watched = (Monitor, ParameterHook, ProximalPolicy, CriticValues)
        callbacks.insert(max(_last(callbacks, kind) for kind in watched) + 1, ForgottenState())


def _last(callbacks: list[L.Callback], kind: type) -> int:
    """Index of the last callback of a kind; -1 if there is none."""
    return max((place for place, one in enumerate(callbacks) if isinstance(one, kind)), default=-1)
