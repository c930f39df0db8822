"""A trainer's callbacks, and the one of a class."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

C = TypeVar("C", bound=L.Callback)


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a trainer, which Lightning's annotations leave out. The list is the trainer's own."""
    found: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def callback_of(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The first callback of a class or of one derived from it; None if there is none."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)
