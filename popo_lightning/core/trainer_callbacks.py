"""Finds a trainer's callback by its class."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

C = TypeVar("C", bound=L.Callback)


def callback_of(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The first callback of a class; None if there is none.

    Args:
        trainer: Trainer with the callbacks.
        kind: Class of the callback, or a base of it.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
