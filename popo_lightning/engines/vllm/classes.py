"""Restores transformers classes that vLLM's transformers backend has modified.

For a model that vLLM has no code for, it runs transformers' own and decorates the class in place: the class gets
another base, ``__init__`` and ``__call__``. The trainer's model has the same class, and would run vLLM's code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# Attributes that Python itself writes into a class when it is inspected.
INCIDENTAL = ("__annotations__", "__abstractmethods__", "_abc_impl", "__doc__", "__dict__", "__weakref__")


class ClassesBefore:
    """The present state of the module classes of transformers."""

    def __init__(self) -> None:
        self._kept = {kind: (kind.__bases__, dict(vars(kind))) for kind in _classes(nn.Module)}

    def put_back(self, modules: Iterable[nn.Module] = ()) -> None:
        """Restores all classes.

        Args:
            modules: Modules that need their changed classes; each gets a class of its own.
        """
        changed: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
        for kind, (bases, attributes) in self._kept.items():
            new = {name: value for name, value in vars(kind).items() if _differs(name, value, attributes)}
            if new or kind.__bases__ != bases:
                changed[kind] = tuple(base for base in kind.__bases__ if base not in bases), new
        for kind, (_, new) in changed.items():
            bases, attributes = self._kept[kind]
            kind.__bases__ = bases
            for name in new:
                if name in attributes:
                    setattr(kind, name, attributes[name])
                else:
                    delattr(kind, name)
        own = {kind: type(kind.__name__, (kind, *bases), new) for kind, (bases, new) in changed.items()}
        for module in modules:
            if type(module) in own:
                module.__class__ = own[type(module)]


def _differs(name: str, value: Any, before: dict[str, Any]) -> bool:
    return name not in INCIDENTAL and (name not in before or before[name] is not value)


def _classes(kind: type) -> Iterator[type]:
    """All transformers classes below a class, once each."""
    seen: set[type] = set()
    waiting = [kind]
    while waiting:
        found: list[type] = waiting.pop().__subclasses__()
        for below in found:
            if below not in seen:
                seen.add(below)
                waiting.append(below)
                if below.__module__.startswith("transformers."):
                    yield below
