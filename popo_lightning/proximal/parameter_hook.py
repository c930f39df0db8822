"""Parameter hooks: rules that set weights outside the optimizer's steps."""

from __future__ import annotations

import lightning as L

from popo_lightning.core.kept_state import KeepsState


class ParameterHook(KeepsState, L.Callback):
    """Slot: changes the policy's or the reference's weights between optimizer steps. The base class changes nothing.

    A checkpoint keeps the attributes that ``state`` names.
    """

    transient = ("log", "log_dict")  # Lightning sets them during a hook
