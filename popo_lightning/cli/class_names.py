"""Short class names: a setting may name a class of this package without its module."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from popo_lightning.core.did_you_mean import ROOMS


def import_classes() -> None:
    """Imports all classes that settings may name: jsonargparse finds only imported subclasses by name."""
    for name in ROOMS:
        package = import_module(f"popo_lightning.{name}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
