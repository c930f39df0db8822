"""Short class names: a setting may name a class of this package without its module."""

from __future__ import annotations

import pkgutil
from importlib import import_module

ROOMS = ("objectives", "methods", "model", "replay", "engines", "tasks", "toys", "verifiers", "proximal", "grading")


def import_slots() -> None:
    """Imports the rooms whose classes settings may name, since jsonargparse only knows imported subclasses by name."""
    for room in ROOMS:
        package = import_module(f"popo_lightning.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
