"""Names of classes in settings: short ones for this package's classes, and import paths."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from popo_lightning.core.did_you_mean import ROOMS


def import_classes() -> None:
    """Imports all classes that settings may name: jsonargparse finds only imported subclasses by name."""
    for name in ROOMS:
        package = import_module(f"popo_lightning.{name}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)


def object_at(path: str) -> Any:
    """The class or function that a class_path names. A package's attribute goes before its module of the same name.

    Raises:
        ImportError: The module cannot be imported.
        AttributeError: The module has no such name.
    """
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
