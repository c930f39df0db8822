"""Off-policy reinforcement learning with verifiable rewards on Lightning, with group replay (POPO) at its center."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["PolicyModule", "RolloutDataModule", "SettingError", "fit", "validate"]
_HOMES = {  # imported on first access, so that importing the package loads neither torch nor vLLM
    "PolicyModule": "policy",
    "RolloutDataModule": "data",
    "SettingError": "core.errors",
    "fit": "cli.from_python",
    "validate": "cli.from_python",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
